"""The benchmark scripts as a user runs them; speed itself is not tested."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

WRONG = """
import _harness as bench
import mlx.core as mx
case = bench.Case(
    name="doubled", dtype="float32", baseline="ours",
    contenders=[bench.Contender(
        name="ours", run=lambda: 2 * mx.ones(4), expected=lambda: mx.ones(4)
    )],
)
bench.measure(case, bench.Settings())
"""


def run(*arguments: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    paths = {"PYTHONPATH": str(ROOT)}  # also where the package is not installed
    return subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, env=os.environ | paths
    )


def test_a_wrong_result_is_not_timed() -> None:
    done = run("-c", WRONG, cwd=ROOT / "benchmarks")
    assert done.returncode != 0
    assert "ours is 1.00e+00 off its reference" in done.stderr
    assert "nothing was timed" in done.stderr


def test_a_case_is_one_line_with_machine_and_losses(tmp_path: Path) -> None:
    copy = tmp_path / "lines.jsonl"
    script = ROOT / "benchmarks" / "bench_layer.py"
    done = run(script, "--smoke", "--only", "decode", "--json", copy)
    assert done.returncode == 0, done.stderr
    assert copy.read_text() == done.stdout
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert lines
    for line in lines:
        for key in ("chip", "os", "mlx", "commit", "dtype", "blas", "runs"):
            assert key in line
        assert line["time_ratio"][line["baseline"]] == 1
        for figures in line["contenders"].values():
            assert figures["p20_ms"] <= figures["median_ms"] <= figures["p80_ms"]


def test_the_scale_benchmark_compares_with_an_earlier_run(tmp_path: Path) -> None:
    script, earlier = ROOT / "benchmarks" / "bench_scale.py", tmp_path / "before.jsonl"
    done = run(script, "--smoke", "--only", "extract", "--output", earlier)
    assert done.returncode == 0, done.stderr
    (record,) = (json.loads(line) for line in earlier.read_text().splitlines())
    assert record["matrices"] == 14
    record |= {"seconds": 100.0, "peak_bytes": 2e9}
    earlier.write_text(json.dumps(record))
    done = run(script, "--smoke", "--only", "extract", "--before", earlier)
    assert done.returncode == 0, done.stderr
    row = done.stdout.splitlines()[-1]
    assert row.startswith("| extract | 100.0 → ")
    assert "| 2000 → " in row


@pytest.mark.slow
def test_an_interrupted_comparison_of_variants_continues(
    tiny_model_folder: Path, tmp_path: Path
) -> None:
    for task, answers in (
        ("labels", [" quick", " lazy"]),
        ("text", [f" the fox {i}" for i in range(30)]),
    ):
        (tmp_path / task).mkdir()
        rows = [
            {"prompt": f"dog {i}", "completion": answers[i % len(answers)]}
            for i in range(30)
        ]
        for name in ("train", "valid", "test"):
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (tmp_path / task / f"{name}.jsonl").write_text(text)
    output = tmp_path / "runs.jsonl"
    command = [ROOT / "benchmarks" / "compare_variants.py", "--smoke"]
    command += ["--output", output, "--model", tiny_model_folder, "--rank", "3"]
    for task in ("labels", "text"):
        command += ["--task", task, tmp_path / task]
    first = run(*command, "--method", "lora")
    assert first.returncode == 0, first.stderr
    before = output.read_text()
    methods = ("lora", "dora", "full", "doran-aux", "edora", "bidora")
    second = run(*command, *(part for name in methods for part in ("--method", name)))
    assert second.returncode == 0, second.stderr
    assert output.read_text().startswith(before)
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    # Two tasks: the base, then each method at three rates and at the chosen rate.
    assert len(lines) == 2 * (1 + len(methods) * 4)
    assert all(0 <= line["accuracy"] <= 1 for line in lines if line["seed"] == 0)
    assert not any("accuracy" in line for line in lines if line["seed"] == 1000)
    trained = {line["method"]: line["trainable"] for line in lines}
    # A block of width 32 and 64: off by less than a rank of its largest matrix.
    for method in ("lora", "doran-aux", "bidora"):
        assert trained["dora"] - 96 < trained[method] <= trained["dora"]
    # Squares fit less well: each of 7 matrices is below the next square.
    assert trained["dora"] - 7 * 40 < trained["edora"] <= trained["dora"]
    assert "| full (n = 1) |" in second.stdout


def test_the_trunk_changes_no_loss(tiny_model_folder: Path) -> None:
    script = """
import _harness as bench
import mlx.core as mx
from _trunk import Trunk, mean_loss, measure, shared_tokens, target_loss
from mlx_dora.adapters.hosting import load
from mlx_dora.data.batches import pad_batch
from mlx_dora.evaluate.loss import loss_fn
model, _ = load(FOLDER)
rows = [([5, 7, 9, 11, 13, 2], 3), ([4, 6, 8], 2), ([3, 1, 4, 1, 5, 9, 2, 6], 1)]
trunk = Trunk(model, 1)
batch, lengths = trunk.batch(rows)
ours, count = target_loss(1)(model, batch, lengths)
usual, all_count = loss_fn(model, *pad_batch(rows, 99))
assert count.item() == all_count.item() == 11, (count, all_count)
assert abs(ours.item() - usual.item()) < 1e-5, (ours, usual)
whole = measure(model, trunk, rows)
assert abs(whole.loss - usual.item()) < 1e-5, (whole, usual)
alike = [([5, 7, 9, 11, 13, 2], 3), ([5, 7, 9, 6, 8], 4), ([5, 7, 9, 1, 4, 1, 2], 5)]
assert shared_tokens([tokens for tokens, _ in alike]) == 3
usual, _ = loss_fn(model, *pad_batch(alike, 99))
for rows in (alike, alike[::-1]):
    loss = mean_loss(model, Trunk(model, 1), rows)
    assert abs(loss - usual.item()) < 1e-5, (loss, usual)
whole = [(tokens, 1) for tokens, _ in alike]  # no token without a target
usual, _ = loss_fn(model, *pad_batch(whole, 99))
assert abs(mean_loss(model, Trunk(model, 1), whole) - usual.item()) < 1e-5
assert shared_tokens([[1, 2], [1, 2, 3]]) == 1  # a row keeps a token of its own
"""
    script = script.replace("FOLDER", repr(str(tiny_model_folder)))
    done = run("-c", script, cwd=ROOT / "benchmarks")
    assert done.returncode == 0, done.stderr


def test_pace_reports_time_and_memory_of_a_step(
    tiny_model_folder: Path, tmp_path: Path
) -> None:
    rows = [{"prompt": f"dog {i}", "completion": f" fox {i}"} for i in range(30)]
    for name in ("train", "valid", "test"):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text)
    command = [ROOT / "benchmarks" / "compare_variants.py", "--pace", "--iters", "4"]
    command += ["--output", tmp_path / "pace.jsonl", "--model", tiny_model_folder]
    command += ["--task", "text", tmp_path, "--num-layers", "1", "--seed", "0"]
    done = run(*command, "--method", "lora", "--method", "dora")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(x) for x in (tmp_path / "pace.jsonl").read_text().splitlines()]
    assert [line["method"] for line in lines] == ["lora", "dora"]
    assert all(len(line["step_ms"]) == 2 for line in lines)
    assert all(ms > 0 for line in lines for ms in line["step_ms"])
    assert "| dora |" in done.stdout


@pytest.mark.real_model
@pytest.mark.usefixtures("smollm")
def test_the_first_output_of_a_command_is_timed_and_shown() -> None:
    script = ROOT / "benchmarks" / "first_output.py"
    done = run(script, "--runs", "1", "mlx_dora.doctor", "mlx_dora.chat")
    assert done.returncode in (0, 1), done.stderr  # 1: this machine is busy
    head, *rows = done.stdout.splitlines()[:4]
    assert head.split()[:3] == ["command", "--help", "first"]
    expected = {
        "chat --adapter-path": "Base: ",
        "chat --model": "Loading ",
        "doctor": "Examining this machine",
    }
    for row, (name, shown) in zip(rows, expected.items(), strict=True):
        assert row.startswith(f"mlx_dora.{name} ")
        times = row.removeprefix(f"mlx_dora.{name}").split()[:2]
        assert all(0 < float(number) < 60 for number in times)
        assert shown in row


HELD_OUT = ["sort", "records"]
"""A combination of `_grid_entries.HELD_OUT`."""


def grid_line(of: list[str], contender: str, **losses: float) -> str:
    tasks = {task: {"test": loss} for task, loss in losses.items()}
    return json.dumps({"of": of, "contender": contender, "tasks": tasks})


def test_the_grid_of_merges_shows_regret_and_tasks_above_the_base(
    tmp_path: Path,
) -> None:
    two, three = ["a", "b"], ["a", "b", "c"]
    lines = [
        grid_line(two, "(base)", x=4.0, y=2.0),
        grid_line(two, "(alone)", x=2.0, y=1.0),
        grid_line(two, "karcher", x=3.0, y=1.5),
        grid_line(two, "tsv, total 1.41", x=2.5, y=1.2),
        grid_line(three, "(base)", x=4.0, y=2.0, z=1.0),
        grid_line(three, "(alone)", x=2.0, y=1.0, z=0.5),
        grid_line(three, "karcher", x=3.0, y=1.5, z=0.8),
        grid_line(three, "tsv, total 1.73", x=2.0, y=1.0, z=1.2),
        grid_line(three, "(auto)", x=2.5, y=1.5, z=0.8),
        grid_line(["a"], "(trained)"),
        grid_line(HELD_OUT, "(base)", x=4.0, y=2.0),
        grid_line(HELD_OUT, "(alone)", x=2.0, y=1.0),
        grid_line(HELD_OUT, "karcher", x=3.0, y=1.6),
        json.dumps(
            {**json.loads(grid_line(HELD_OUT, "(advice)")), "advised": "karcher"}
        ),
    ]
    results = tmp_path / "grid.jsonl"
    results.write_text("\n".join(lines) + "\n")
    done = run(ROOT / "benchmarks" / "merge_grid.py", "--table", results)
    assert done.returncode == 0, done.stderr
    table = [line.split(" | ") for line in done.stdout.splitlines()]
    rows = {row[0].strip("| "): row[1:] for row in table if len(row) == 6}
    # Means 2.25 and 1.7667 against 1.85 and 1.4.
    assert rows["karcher"][:2] == ["2.25 (50%)", "1.77 (40%)"]
    assert rows["karcher"][2] == "0.383 ± 0.017"
    assert rows["karcher"][3:] == ["0 of 2", "0 |"]
    # One row for any number of adapters; z is above the base by two fifths of .5.
    assert rows["tsv, sum √N"][1:] == ["1.40 (-40%)", "0.000 ± 0.000", "2 of 2", "1 |"]
    # What data choose is no contender: its loss does not make the least.
    assert rows["*with data*"] == ["", "1.60 (40%)", "0.200 ± 0.000", "0 of 1", "0 |"]
    assert "| 2 | a + b + c | x 4.00, 2.00, y 2.00, 1.00, z 1.00, 0.50 |" in done.stdout
    # Combinations that were held out have a table of their own.
    held = done.stdout.strip().split("\n\n")[2].splitlines()
    assert held[0].startswith("| | 3 | above the best |")
    assert held[-1] == "| *without data* | 2.30 (40%) | 0.000 ± 0.000 | 1 of 1 | 0 |"


def test_the_page_has_the_tables_of_the_grids_results() -> None:
    results = ROOT / "benchmarks" / "results" / "merge_grid.jsonl"
    done = run(ROOT / "benchmarks" / "merge_grid.py", "--table", results)
    assert done.returncode == 0, done.stderr
    page = (ROOT / "docs" / "merging.md").read_text()
    for table in done.stdout.strip().split("\n\n"):
        assert table in page
