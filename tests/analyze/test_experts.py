"""Analysis of single experts, with known answers."""

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from click.testing import CliRunner
from mlx_lm.models.switch_layers import SwitchLinear

from mlx_dora import DoRAConfig, save_adapter
from mlx_dora.adapters.adapter import Adapter
from mlx_dora.analyze import analyze_adapter, compare_adapters
from mlx_dora.analyze.table import analysis_lines
from mlx_dora.cli.analyze import command
from mlx_dora.errors import DoRAError
from tests.adapters.stacks import (
    EXPERTS,
    dense_stack,
    make_adapter,
    make_model,
    write_folder,
)

KEYS = EXPERTS["qwen3_moe"]
GATE = "model.layers.1.mlp.switch_mlp.gate_proj"
NOTHING = Adapter(config=DoRAConfig(), tensors={})


def changed(adapter: Adapter, leaf: str, index: int, by: float) -> Adapter:
    """Return the adapter with one expert's values multiplied by a factor."""
    name = f"{GATE}.{leaf}"
    value = mx.array(adapter.tensors[name])
    value[index] = by * value[index]
    return replace(adapter, tensors=adapter.tensors | {name: value})


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("kind", ["qwen3_moe", "deepseek_v3"])
def test_every_expert_against_float64(kind: str, bits: int | None) -> None:
    model = make_model(kind, bits)
    adapter = make_adapter(model, 1, EXPERTS[kind])
    matrices = {
        matrix.name: matrix for matrix in analyze_adapter(adapter, model).layers
    }
    assert len(matrices) == 4 * len(adapter.paths)
    for path in adapter.paths:
        before = dense_stack(model, NOTHING, path)
        after = dense_stack(model, adapter, path)
        for index, (old, new) in enumerate(zip(before, after, strict=True)):
            matrix = matrices[f"{path}[{index}]"]
            n0, n1 = np.linalg.norm(old, axis=1), np.linalg.norm(new, axis=1)
            cosine = (old * new).sum(1) / (n0 * n1)
            assert (matrix.rows, matrix.path, matrix.rank) == (len(old), path, 3)
            assert matrix.module == path.rpartition(".")[2]
            assert matrix.delta_m == pytest.approx(np.abs(n1 - n0).mean(), rel=1e-4)
            assert matrix.delta_d == pytest.approx((1 - cosine).mean(), rel=1e-4)
            a, b = (
                np.array(adapter.tensors[f"{path}.{leaf}"][index], np.float64)
                for leaf in ("lora_a", "lora_b")
            )
            values = np.linalg.svd(2.0 * b @ a, compute_uv=False)[:3]
            assert matrix.singular_values == pytest.approx(values, rel=1e-4)


def test_only_the_expert_that_grew_is_reported_as_changed() -> None:
    model = make_model("qwen3_moe")
    adapter = make_adapter(model, 1, KEYS)
    still = {n: 0 * v for n, v in adapter.tensors.items() if n.endswith("lora_b")}
    for path in adapter.paths:
        norm = np.linalg.norm(dense_stack(model, NOTHING, path), axis=2)
        still[f"{path}.m"] = mx.array(norm.astype(np.float32))
    adapter = replace(adapter, tensors=adapter.tensors | still)
    analysis = analyze_adapter(changed(adapter, "m", 2, 2.0), model)
    moved = [matrix for matrix in analysis.layers if matrix.classification != "minimal"]
    assert [matrix.name for matrix in moved] == [f"{GATE}[2]"]
    assert moved[0].classification == "amplified"
    assert moved[0].delta_m_relative == pytest.approx(1, rel=1e-6)


def test_the_table_has_a_line_a_stack_or_a_line_an_expert() -> None:
    model = make_model("qwen3_moe")
    analysis = analyze_adapter(make_adapter(model, 1, KEYS), model)
    by_matrix = analysis_lines(analysis, by="matrix")
    gate = GATE.removeprefix("model.layers.")
    gate = f"{gate[:6]}…{gate[-17:]}"
    assert by_matrix[0].startswith("model.layers.… ")
    assert max(map(len, by_matrix[:5])) <= 80
    assert sum(line.startswith(f"{gate} ") for line in by_matrix) == 1
    assert not any("[" in line.partition("  ")[0] for line in by_matrix[1:5])
    by_expert = analysis_lines(analysis, by="expert")
    assert (
        len([n for n in by_expert if n[:6] == gate[:6] and f"{GATE[-9:]}[" in n]) == 4
    )
    own = [matrix.delta_m for matrix in analysis.layers if matrix.path == GATE]
    (line,) = [line for line in by_matrix if line.startswith(f"{gate} ")]
    assert f"{np.mean(own):.2e}" in line


def test_ranks_of_a_stack_count_once_an_expert() -> None:
    model = make_model("qwen3_moe")
    adapter = make_adapter(model, 1, (*KEYS, "self_attn.q_proj"), rank=4)
    narrow = f"{GATE}.lora_a"
    first = mx.concatenate(
        [adapter.tensors[narrow][:, :1], mx.zeros((4, 3, 64))], axis=1
    )
    adapter = replace(adapter, tensors=adapter.tensors | {narrow: first})
    analysis = analyze_adapter(adapter, model)
    pattern = analysis.rank_pattern(2)
    assert pattern.keys() == set(adapter.paths)
    assert pattern[GATE] == 1
    counts = [4 if "switch" in path else 1 for path in adapter.paths]
    used = sum(pattern[p] * n for p, n in zip(adapter.paths, counts, strict=True))
    assert 2 * len(analysis.layers) - 3 <= used <= 2 * len(analysis.layers)


def test_two_adapters_are_compared_expert_by_expert() -> None:
    model = make_model("qwen3_moe")
    first = make_adapter(model, 1, KEYS)
    other = changed(changed(first, "lora_b", 1, -1.0), "lora_b", 3, 0.5)
    x = mx.array(np.random.default_rng(0).standard_normal((50, 64)).astype("f"))
    result = compare_adapters([first, other], model, activations={f"{GATE}[3]": x})
    pairs = {pair.name: pair for pair in result.pairs}
    cosines = [pairs[f"{GATE}[{i}]"].update_cosine for i in range(4)]
    assert cosines == pytest.approx([1, -1, 1, 1])
    assert [pair.name for pair in result.conflicts] == [f"{GATE}[1]"]
    assert pairs[f"{GATE}[3]"].size_ratio == pytest.approx(0.5)
    assert pairs[f"{GATE}[3]"].disturbs_first == pytest.approx(0.5)
    assert result.ranks[f"{GATE}[0]"] <= 3


def test_nan_in_an_expert_is_named() -> None:
    model = make_model("qwen3_moe")
    adapter = make_adapter(model, 1, KEYS)
    dict(model.named_modules())[GATE]["weight"][2, 0, 0] = mx.nan
    with pytest.raises(DoRAError, match=r"gate_proj\[2\] of the base holds NaN"):
        analyze_adapter(adapter, model, check_base=False)


def test_the_commands_take_experts(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "base", "mixtral", 4)
    model = make_model("mixtral", 4)
    for seed in (1, 2):
        adapter = make_adapter(model, seed, EXPERTS["mixtral"])
        save_adapter(adapter, tmp_path / f"a{seed}")
    a1, a2 = (str(tmp_path / name) for name in ("a1", "a2"))
    for arguments in (
        ["adapter", a1, "--model", str(folder), "--by", "expert"],
        ["compare", a1, a2, "--model", str(folder)],
    ):
        result = CliRunner().invoke(command, arguments)
        assert result.exit_code == 0, result.output
        assert "mlp.up_proj[3]" in result.output


@pytest.mark.parametrize("bits", [None, 4])
def test_no_array_as_large_as_the_experts(bits: int | None) -> None:
    mx.random.seed(0)
    base = SwitchLinear(256, 256, 64, bias=False)
    base.set_dtype(mx.bfloat16)
    model = nn.Module()
    model.experts = base if bits is None else base.to_quantized(64, bits)
    mx.eval(model.parameters())
    tensors = {
        "experts.lora_a": mx.random.normal((64, 4, 256)),
        "experts.lora_b": mx.random.normal((64, 256, 4)),
        "experts.m": mx.random.uniform(shape=(64, 256)),
    }
    mx.eval(tensors)
    config = DoRAConfig(rank=4, keys=("experts",), num_layers=0)
    adapter = Adapter(config=config, tensors=tensors)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    analyze_adapter(adapter, model)
    compare_adapters([adapter, adapter], model)
    assert mx.get_peak_memory() - before < 64 * 256 * 256 * 4 / 4
