"""The benchmark scripts as a user runs them; speed itself is not tested."""

import json
import os
import subprocess
import sys
from pathlib import Path

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


def test_label_accuracy_goes_on_where_it_stopped(
    tiny_model_folder: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    rows = [
        {"prompt": f"{word} {i}", "completion": label}
        for i in range(8)
        for word, label in (("fox", " quick"), ("dog", " lazy"))
    ]
    for name in ("train", "valid", "test"):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (data / f"{name}.jsonl").write_text(text)
    output = tmp_path / "runs.jsonl"
    command = [ROOT / "benchmarks" / "label_accuracy.py", "--data", data]
    command += ["--output", output, "--model", tiny_model_folder, "--iters", "2"]
    command += ["--num-layers", "1", "--seed", "3"]
    first = run(*command, "--method", "dora")
    assert first.returncode == 0, first.stderr
    before = output.read_text()
    second = run(*command, "--method", "dora", "--method", "full")
    assert second.returncode == 0, second.stderr
    assert output.read_text().startswith(before)
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["method"] for line in lines] == ["base", "dora", "full"]
    assert all(0 <= line["accuracy"] <= 1 for line in lines)
    assert "dora" in second.stdout


def test_the_comparison_of_variants_goes_on_where_it_stopped(
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
    second = run(*command, "--method", "lora", "--method", "dora", "--method", "full")
    assert second.returncode == 0, second.stderr
    assert output.read_text().startswith(before)
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(lines) == 2 * 3 * 4  # tasks, methods, three rates and the chosen one
    assert all(0 <= line["accuracy"] <= 1 for line in lines if line["seed"] == 0)
    assert not any("accuracy" in line for line in lines if line["seed"] == 1000)
    trained = {line["method"]: line["trainable"] for line in lines}
    # Of one block of width 32 and 64: less than one rank of its largest matrix.
    assert trained["dora"] - 96 < trained["lora"] <= trained["dora"]
    assert "| full (n = 1) |" in second.stdout
