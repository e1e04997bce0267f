"""Estimates Fisher information on data and merges by it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from click.testing import CliRunner

from mlx_dora import DoRAError, load_adapter, save_adapter
from mlx_dora.adapters.attach import attach_adapter
from mlx_dora.adapters.hosting import load
from mlx_dora.cli.merge import command
from mlx_dora.merge import estimate_fisher, merge_adapters
from mlx_dora.merge.fisher.config import FisherConfig
from mlx_dora.merge.fisher.estimate import read_targets, write_fisher
from mlx_dora.merge.fisher.information import load_fisher
from tests.adapters.training import QV
from tests.checks import assert_close, to_numpy
from tests.merge.adapters.test_merge import train

MakeFolder = Callable[..., Path]
WORDS = ["the fox", "a lazy dog", "the quick brown fox jumps", "and then", "returns"]


def write_data(folder: Path, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir()
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "train.jsonl").write_text(lines)
    return folder


@pytest.fixture
def job(make_tiny_folder: MakeFolder, tmp_path: Path) -> tuple[Path, list[str]]:
    """A base, two adapters with different modules, and data for each."""
    base = make_tiny_folder("base")
    model, _ = load(base)
    keys = (QV, (*QV, "mlp.down_proj"))
    for i, own in enumerate(keys, 1):
        first = train(model, i, keys=own, rank=2 + i)
        save_adapter(first, tmp_path / f"a{i}", base_model=str(base))
        rows = [{"prompt": w, "completion": f" {w}"} for w in WORDS[i:]]
        write_data(tmp_path / f"d{i}", rows)
    return base, [str(tmp_path / name) for name in ("a1", "a2", "d1", "d2")]


def test_only_answers_are_targets_by_default(
    make_tiny_folder: MakeFolder, tmp_path: Path
) -> None:
    _, tokenizer = load(make_tiny_folder())
    messages = [
        {"role": role, "content": text}
        for role, text in zip(["user", "assistant"] * 2, WORDS, strict=False)
    ]
    pairs = write_data(tmp_path / "pairs", [{"prompt": "a", "completion": "fox"}])
    chats = write_data(tmp_path / "chats", [{"messages": messages}])
    texts = write_data(tmp_path / "texts", [{"text": "the fox"}])

    def targets(folder: Path, **kw: Any) -> Any:
        return read_targets(FisherConfig(data=str(folder), **kw), tokenizer)[0][1]

    assert targets(pairs) > 0
    assert len(targets(chats)) == 2  # both of the assistant's turns
    assert targets(texts) == 0
    assert targets(pairs, whole=True) == 0
    with pytest.raises(DoRAError, match=r"has no valid data"):
        targets(pairs, split="valid")


def test_which_modules_are_estimated(tiny_model: nn.Module) -> None:
    rows = [([1, 2, 3, 4], 1)]
    result = estimate_fisher(tiny_model, rows)
    assert len(result.paths) == 14  # the seven linear layers of both blocks
    attach_adapter(tiny_model, train(tiny_model, 1))
    adapted = estimate_fisher(tiny_model, rows)
    assert adapted.paths == {f"model.layers.{i}.{key}" for i in (0, 1) for key in QV}
    for wrong in ("model.embed_tokens", "model.layers.0.input_layernorm", "nothing"):
        with pytest.raises(DoRAError, match=f"not of {wrong}"):
            estimate_fisher(tiny_model, rows, paths=[wrong])


def test_the_commands_output_serves_both_merges(
    job: tuple[Path, list[str]], tmp_path: Path
) -> None:
    base, (a1, a2, d1, d2) = job
    made = []
    for i, (adapter, data) in enumerate(((a1, d1), (a2, d2)), 1):
        out = str(tmp_path / f"f{i}")
        result = CliRunner().invoke(
            command,
            ["fisher", "--model", str(base), "--adapter-path", adapter, "--data", data,
             "--save-path", out, "--key", "self_attn.q_proj", "--key",
             "self_attn.v_proj", "--key", "mlp.down_proj"],
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        assert f"in {5 - i} rows" in result.stdout
        made.append(out)
    facts = load_fisher(made[0]).facts
    assert (facts.model, facts.adapter, facts.data) == (str(base), a1, d1)
    args = ["adapters", a1, a2, "--method", "fisher"]
    files = ["--fisher", made[0], "--fisher", made[1]]
    result = CliRunner().invoke(
        command, [*args, *files, "--save-path", str(tmp_path / "one")]
    )
    assert result.exit_code == 0, result.output
    assert "without Fisher" not in result.stdout
    # The same in a single command.
    result = CliRunner().invoke(
        command,
        [*args, "--data", d1, "--data", d2, "--save-path", str(tmp_path / "two")],
    )
    assert result.exit_code == 0, result.output
    first, second = (load_adapter(tmp_path / name) for name in ("one", "two"))
    for name, value in first.tensors.items():
        assert_close(second.tensors[name], to_numpy(value), bound=1e-5)
    # The same in Python.
    merged = merge_adapters([a1, a2], model=base, method="fisher", fisher=made)
    assert all(mx.array_equal(merged.tensors[k], v) for k, v in first.tensors.items())
    result = CliRunner().invoke(
        command,
        ["models", str(base), str(base), "--method", "fisher", *files,
         "--save-path", str(tmp_path / "model")],
    )  # fmt: skip
    assert result.exit_code == 0, result.output


def test_refusals_are_one_line(job: tuple[Path, list[str]], tmp_path: Path) -> None:
    base, (a1, a2, d1, d2) = job
    out = ["--save-path", str(tmp_path / "out")]
    merge = ["adapters", a1, a2, "--method", "fisher", *out]
    short = write_data(tmp_path / "short", [{"prompt": "a"}])
    estimate = ["fisher", "--model", str(base), *out]
    for args, message in (
        (merge, "needs 2 estimates"),
        ([*merge, "--fisher", d1], "needs 2 estimates of the Fisher information"),
        ([*merge, "--fisher", d1, "--fisher", d2], "has no fisher.json"),
        ([*merge, "--data", d1], "expected 2, got 1"),
        ([*merge, "--data", d1, "--data", str(tmp_path / "no")], "no"),
        ([*merge, "--data", d1, "--data", str(short)], "expected the columns"),
        ([*estimate, "--data", d1, "--batch-size", "0"], "batch_size must be"),
        ([*estimate, "--data", d1, "--key", "q_pro"], "no module is called"),
        ([*estimate, "--data", d1, "--max-seq-length", "2"], "no row has a target"),
    ):
        result = CliRunner().invoke(command, args)
        assert result.exit_code == 1, (args, result.output)
        assert message in result.stderr
        assert result.stderr.rstrip().splitlines()[-1].startswith("Error"), args
        assert not (tmp_path / "out").exists()
    usage = ["adapters", a1, a2, *out, "--data", d1]
    assert CliRunner().invoke(command, usage).exit_code == 2


def test_a_failure_leaves_no_folder_and_the_file_is_resumed_by_no_other(
    job: tuple[Path, list[str]], tmp_path: Path
) -> None:
    base, (_, _, d1, _) = job
    config = FisherConfig(data=d1, granularity="element", memory_limit=1)

    def fail(what: str, total: int, done: int) -> None:
        if total and what == "fisher":
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        write_fisher(base, tmp_path / "out", config=config, progress=fail)
    assert not list(tmp_path.glob("*out*"))
    facts = write_fisher(base, tmp_path / "out", config=config)
    assert facts.granularity == "element"
    result = load_fisher(tmp_path / "out")
    path = "model.layers.0.mlp.up_proj"
    assert result.read(path, (64, 32)) is not None
