"""``--dry-run``: what each tensor would get; nothing is written."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from click.testing import CliRunner

from mlx_dora.cli.merge import command
from mlx_dora.merge.models import read_mergekit
from mlx_dora.merge.models.dry_run import dry_run
from mlx_dora.merge.models.plan import plan_models
from tests.merge.models.mergekit_models import make_all

NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(autouse=True)
def at_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_all(tmp_path)
    monkeypatch.chdir(tmp_path)


def planned(config: dict[str, Any], name: str = NAME) -> str:
    (tensor,) = [t for t in dry_run(read_mergekit(config)).tensors if t.name == name]
    return f"{list(tensor.shape)} {tensor.dtype}: {tensor.treatment}"


def entries(**weights: float) -> list[dict[str, Any]]:
    return [
        {"model": name, "parameters": {"weight": weight}}
        for name, weight in weights.items()
    ]


@pytest.mark.parametrize(
    ("config", "name", "expected"),
    [
        (
            {"merge_method": "ties", "base_model": "BASE",
             "models": entries(A=0.5, B=1.0),
             "parameters": {"density": [0.1, 0.3], "lambda": 0.8}},
            NAME,
            "[24, 16] float32: ties of A, B over BASE; by element; weights 0.5, 1; "
            "density 0.3, 0.3; lambda 0.8",
        ),
        (
            {"merge_method": "slerp", "base_model": "B",
             "models": [{"model": "A"}], "dtype": "bfloat16",
             "parameters": {"t": [{"filter": "mlp", "value": 0.25}, {"value": 1}]}},
            NAME,
            "[24, 16] bfloat16: slerp of B, A; as one vector; weights 0.75, 0.25",
        ),
        (
            {"merge_method": "breadcrumbs", "base_model": "BASE",
             "models": entries(A=1.0), "parameters": {"gamma": 0.2, "density": 0.5}},
            NAME,
            "[24, 16] float32: breadcrumbs of A over BASE; by element; weights 1; "
            "density 0.5; lambda 1; gamma 0.2",
        ),
        (
            {"merge_method": "passthrough", "slices": [
                {"sources": [{"model": "A", "layer_range": [0, 1]}]},
                {"sources": [{"model": "B", "layer_range": [0, 2]}]}]},
            NAME,
            "[24, 16] float32: copied from model.layers.0.mlp.up_proj.weight of B",
        ),
        (
            {"merge_method": "passthrough", "models": [
                {"model": "A", "parameters": {"scale": 0.5}}]},
            NAME,
            "[24, 16] float32: copied from A, times 0.5",
        ),
        (
            {"merge_method": "linear", "models": entries(A=1, W=3),
             "tokenizer_source": "union"},
            "model.embed_tokens.weight",
            "[262, 16] float32: linear of A, W; by element; weights 1, 3; rows aligned "
            "by token",
        ),
    ],
)  # fmt: skip
def test_every_treatment_is_said(
    config: dict[str, Any], name: str, expected: str
) -> None:
    assert planned(config, name) == expected


def test_our_own_methods_by_row_the_mean_of_vectors_buffers_and_packing(
    make_tiny_folder: Callable[..., Path],
) -> None:
    packed, dense = make_tiny_folder("packed", bits=4), make_tiny_folder("m", seed=2)
    buffer = "model.layers.0.self_attn.rotary_emb.inv_freq"
    for folder in (packed, dense):
        path = str(folder / "model.safetensors")
        tensors = mx.load(path)
        assert isinstance(tensors, dict)
        mx.eval(tensors)
        mx.save_safetensors(path, {**tensors, buffer: mx.ones(4)}, {"format": "mlx"})
    found = dry_run(plan_models([packed, dense], weights=[0.3, 0.7]))
    lines = {t.name: f"{t.dtype}: {t.treatment}" for t in found.tensors}
    assert lines["model.layers.0.self_attn.q_proj.weight"] == (
        "4 bits in groups of 32: slerp of packed, m; row by row; weights 0.3, 0.7"
    )
    assert lines["model.norm.weight"] == (
        "float32: slerp of packed, m; the weighted mean; weights 0.3, 0.7"
    )
    assert lines[buffer] == f"float32: copied from {packed}"
    assert any("dtypes differ" in line or "Rotary" in line for line in found.lines())


def test_the_command_writes_nothing_and_refuses_what_a_merge_refuses() -> None:
    Path("m.yaml").write_text(
        "merge_method: linear\nmodels:\n- model: A\n  parameters: {weight: 1}\n"
        "- model: B\n  parameters: {weight: 1}\nparameters: {int8_mask: true}\n"
    )
    args = ["models", "-c", "m.yaml", "--dry-run", "--json", "out.json"]
    before = {path.name for path in Path().iterdir()}
    result = CliRunner().invoke(command, args)
    assert result.exit_code == 0, result.output
    assert "int8_mask has no effect" in result.stdout
    assert result.stdout.count("linear of A, B; by element; weights 1, 1") == 20
    assert "Would merge 20 tensors" in result.stdout
    assert {path.name for path in Path().iterdir()} == before | {"out.json"}
    found = json.loads(Path("out.json").read_text())
    assert len(found["tensors"]) == 20
    result = CliRunner().invoke(command, ["models", "-c", "m.yaml"])
    assert result.exit_code == 2
    assert "give --save-path, or --dry-run" in result.stderr
    Path("m.yaml").write_text("merge_method: linear\nmodels:\n- model: A\n- model: B\n")
    result = CliRunner().invoke(command, args[:4])
    assert result.exit_code == 1
    assert "no weight for model.embed_tokens.weight of A, B" in result.stderr


def test_parameters_of_one_method_are_options() -> None:
    args = ["models", "A", "--base", "BASE", "--method", "nearswap", "--dry-run"]
    result = CliRunner().invoke(command, [*args, "--set", "t=0.01"])
    assert result.exit_code == 0, result.output
    assert "nearswap of A over BASE; by element; t 0.01" in result.stdout
    for extra, code, message in (
        ([], 1, "nearswap needs a value of t"),
        (["--set", "gamma=1"], 1, "gamma has no effect on nearswap; it uses t"),
        (["--set", "t=x"], 2, "t needs a number, got 'x'"),
        (["--set", "u=1"], 2, "expected NAME=VALUE with a name of gamma"),
        (["--set", "t=-1"], 1, "t must be 0 or more, got -1"),
    ):
        result = CliRunner().invoke(command, [*args, *extra])
        assert result.exit_code == code, extra
        assert message in result.stderr.replace("\n", " "), result.stderr
