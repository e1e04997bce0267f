"""Merging, comparing and extracting adapters of experts, matrix by matrix."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.switch_layers import SwitchLinear

from mlx_dora import DoRAConfig, DoRAError, load, load_adapter
from mlx_dora.adapters.adapter import Adapter
from mlx_dora.adapters.attach import attach_adapter
from mlx_dora.adapters.files import save_adapter
from mlx_dora.fuse.config import FuseConfig
from mlx_dora.fuse.model import fuse_model
from mlx_dora.merge import merge_adapters
from mlx_dora.merge.adapters.dense import Options
from mlx_dora.merge.adapters.extract import extract_adapter
from mlx_dora.merge.adapters.merge import merge_adapters_report
from mlx_dora.merge.methods import METHODS
from tests.adapters.stacks import (
    EXPERTS,
    TOKENS,
    dense_stack,
    make_adapter,
    make_model,
    write_folder,
)
from tests.checks import assert_close, to_numpy
from tests.merge.methods.test_elementwise import ties_truth
from tests.merge.names import ALL, CHOOSING, FISHER, NORMALIZED, most, needed
from tests.merge.oracle import dense_karcher, dense_nmean, dense_slerp

GATE = "model.layers.1.mlp.switch_mlp.gate_proj"
BITS = pytest.mark.parametrize("bits", [None, 4])
Oracle = Callable[[list[np.ndarray]], np.ndarray]
ORACLES: dict[str, tuple[int, Oracle]] = {
    "slerp": (2, lambda rows: dense_slerp(rows[0], rows[1], 0.5)),
    "nmean": (3, lambda rows: dense_nmean(rows, [1 / 3] * 3)),
    "karcher": (3, lambda rows: dense_karcher(rows, [1 / 3] * 3)),
    "linear": (3, lambda rows: np.mean(rows, axis=0)),
}


def adapters_of(model: nn.Module, kind: str, count: int) -> list[Adapter]:
    """Adapters that differ in rank, scale and modules; the third is LoRA."""
    keys = EXPERTS[kind]
    return [
        make_adapter(model, 1, keys),
        make_adapter(model, 2, keys[:1], rank=5, scale=0.5),
        make_adapter(model, 3, keys[:1], kind="lora"),
    ][:count]


@BITS
@pytest.mark.parametrize("kind", ["qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize("method", list(ORACLES))
def test_directional_merges_of_every_expert(
    method: str, kind: str, bits: int | None
) -> None:
    model = make_model(kind, bits)
    count, oracle = ORACLES[method]
    adapters = adapters_of(model, kind, count)
    report = merge_adapters_report(adapters, model=model, method=method)
    merged = report.adapter
    for path in merged.paths:
        stacks = [dense_stack(model, adapter, path) for adapter in adapters]
        result = dense_stack(model, merged, path)
        for index, matrix in enumerate(result):
            assert_close(matrix, oracle([stack[index] for stack in stacks]))
    stack = [layer for layer in report.layers if layer.path == GATE]
    assert [layer.name for layer in stack] == [f"{GATE}[{i}]" for i in range(4)]
    assert {layer.rank for layer in stack} == {8 if count == 2 else 11}
    attach_adapter(model, merged)  # the merged config matches the model


@BITS
def test_element_wise_merges_process_one_expert_at_a_time(bits: int | None) -> None:
    model = make_model("qwen3_moe", bits)
    pair = [make_adapter(model, seed, EXPERTS["qwen3_moe"]) for seed in (1, 2)]
    merged = merge_adapters(pair, model=model, method="ties", rank=32, density=0.4)
    empty = Adapter(config=DoRAConfig(), tensors={})
    base = dense_stack(model, empty, GATE)
    plain = [
        Adapter(
            config=adapter.config,
            tensors={n: v for n, v in adapter.tensors.items() if not n.endswith(".m")},
        )
        for adapter in pair
    ]
    rows = [dense_stack(model, adapter, GATE) for adapter in plain]
    result = dense_stack(model, merged, GATE)
    for index in range(4):
        deltas = [
            item[index].astype(np.float32) - base[index].astype(np.float32)
            for item in rows
        ]
        direction = base[index] + ties_truth(deltas, [1.0, 1.0], [0.4, 0.4], True)
        unit = direction / np.linalg.norm(direction, axis=1, keepdims=True)
        length = np.linalg.norm(result[index], axis=1, keepdims=True)
        assert_close(result[index], length * unit, bound=1e-4)


@pytest.mark.parametrize("method", [m for m in ALL if m not in (FISHER, *CHOOSING)])
def test_copies_give_the_same_experts(method: str) -> None:
    model = make_model("deepseek_v3", 4)
    first = make_adapter(model, 1, EXPERTS["deepseek_v3"])
    density = 1.0 if METHODS[method].density else None
    options = Options(density=density, own=needed(method))
    weights = [0.5, 0.5] if METHODS[method].takes_weights else None
    merged = merge_adapters_report(
        [first, first][: most(method, 2)],
        model=model,
        method=method,
        weights=weights,
        options=options,
    ).adapter
    if method == "tsv":  # orthogonalized copies differ from a single copy
        return
    for path in first.paths:
        truth = dense_stack(model, first, path)
        assert_close(dense_stack(model, merged, path), truth, bound=1e-5)


@pytest.mark.parametrize("method", [m for m in NORMALIZED if m != FISHER])
def test_one_adapter_comes_back_bit_for_bit(method: str, tmp_path: Path) -> None:
    model = make_model("qwen3_moe")
    first, other = adapters_of(model, "qwen3_moe", 2)
    merge_adapters(
        [first, other], model=model, method=method, weights=[1.0, 0.0],
        save_path=tmp_path / "out",
    )  # fmt: skip
    result = load_adapter(tmp_path / "out")
    assert result.tensors.keys() == first.tensors.keys()
    for name, value in first.tensors.items():
        assert mx.array_equal(result.tensors[name], value)


def test_rank_is_cut_expert_by_expert(tmp_path: Path) -> None:
    model = make_model("qwen3_moe")
    pair = adapters_of(model, "qwen3_moe", 2)
    merge_adapters(pair, model=model, method="nmean", rank=4, save_path=tmp_path / "m")
    merged = load_adapter(tmp_path / "m")
    assert merged.tensors[f"{GATE}.lora_a"].shape == (4, 4, 64)
    whole = dense_stack(model, merge_adapters(pair, model=model, method="nmean"), GATE)
    assert_close(dense_stack(model, merged, GATE), whole, bound=0.1)


def test_an_adapter_of_other_experts_is_refused() -> None:
    model = make_model("qwen3_moe")
    first = make_adapter(model, 1, EXPERTS["qwen3_moe"])
    short = {n: v[:3] for n, v in first.tensors.items()}
    bad = Adapter(config=first.config, tensors=short)
    with pytest.raises(DoRAError, match=r"gate_proj.lora_a has shape \(3, 3, 64\)"):
        merge_adapters([first, bad], model=model, method="slerp")


@BITS
def test_no_array_as_large_as_the_experts(bits: int | None) -> None:
    mx.random.seed(0)
    base = SwitchLinear(256, 256, 64, bias=False)
    model = nn.Module()
    model.experts = base if bits is None else base.to_quantized(64, bits)
    mx.eval(model.parameters())
    keys = ("experts",)
    config = DoRAConfig(rank=4, scale=2.0, keys=keys, num_layers=0)
    tensors = {
        "experts.lora_a": mx.random.normal((64, 4, 256)),
        "experts.lora_b": 0.05 * mx.random.normal((64, 256, 4)),
        "experts.m": mx.random.uniform(shape=(64, 256)),
    }
    first = Adapter(config=config, tensors=tensors)
    other = Adapter(config=config, tensors={n: 0.9 * v for n, v in tensors.items()})
    mx.eval(first.tensors, other.tensors)
    stack = 64 * 256 * 256 * 4
    for method in ("slerp", "ties"):
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        merge_adapters([first, other], model=model, method=method, rank=4)
        # Two adapters in, one out, and float32 copies of one expert at a time.
        assert mx.get_peak_memory() - before < stack / 2, method


@BITS
def test_experts_come_out_of_a_fused_model(bits: int | None, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "base", "mixtral", bits)
    model, _ = load(folder)
    adapter = make_adapter(model, 1, EXPERTS["mixtral"])
    path = adapter.paths[0]
    save_adapter(adapter, tmp_path / "adapter")
    attach_adapter(model, adapter)
    expected = to_numpy(model(TOKENS))
    config = FuseConfig(mode="dequantize" if bits else "requantize")
    fuse_model(folder, tmp_path / "adapter", tmp_path / "tuned", config=config)
    result = extract_adapter(
        folder, tmp_path / "tuned", rank=3, save_path=tmp_path / "out"
    )
    assert len(result.layers) == 8
    assert f"{path}[1]" in {layer.path for layer in result.layers if layer.error < 1e-2}
    assert result.adapter.tensors[f"{path}.lora_a"].shape == (4, 3, 64)
    again, _ = load(folder, tmp_path / "out")
    assert_close(again(TOKENS), expected, bound=1e-3)


def test_experts_that_did_not_change_get_an_update_of_zeros(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "base", "mixtral")
    tuned = tmp_path / "tuned"
    shutil.copytree(folder, tuned)
    path = "model.layers.0.block_sparse_moe.switch_mlp.up_proj"
    file = str(tuned / "model.safetensors")
    tensors: Any = mx.load(file)
    mx.eval(tensors)
    weight = tensors[f"{path}.weight"]
    low = mx.random.normal((64, 3)) @ mx.random.normal((3, 64))
    weight[1] = weight[1] + 0.02 * low
    mx.save_safetensors(file, tensors, metadata={"format": "mlx"})
    result = extract_adapter(folder, tuned, energy=1 - 1e-9)
    assert [layer.path for layer in result.layers] == [f"{path}[1]"]
    rank = result.layers[0].rank
    assert rank > 1
    lora_a = result.adapter.tensors[f"{path}.lora_a"]
    assert lora_a.shape == (4, rank, 64)
    model = make_model("mixtral")
    truth = to_numpy(weight)
    assert_close(dense_stack(model, result.adapter, path), truth, bound=1e-4)
    attach_adapter(model, result.adapter, check_base=False)


def test_experts_of_different_ranks_are_padded_with_zeros() -> None:
    """One expert has the same A in both, which is used once."""
    model = make_model("qwen3_moe")
    first, other = (make_adapter(model, seed, EXPERTS["qwen3_moe"]) for seed in (1, 2))
    name = f"{GATE}.lora_a"
    shared = mx.array(other.tensors[name])
    shared[2] = first.tensors[name][2]
    other = replace(other, tensors=other.tensors | {name: shared})
    report = merge_adapters_report([first, other], model=model, method="nmean")
    ranks = [layer.rank for layer in report.layers if layer.path == GATE]
    assert ranks == [6, 6, 3, 6]
    rows = [dense_stack(model, adapter, GATE)[2] for adapter in (first, other)]
    result = dense_stack(model, report.adapter, GATE)[2]
    assert_close(result, dense_nmean(rows, [0.5, 0.5]))
