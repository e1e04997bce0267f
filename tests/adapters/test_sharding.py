"""Dividing a model's weights: what a process reads and holds; no communication."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_dora import DoRAConfig, apply_dora, load
from mlx_dora.adapters.fingerprint import fingerprint
from mlx_dora.adapters.sharding import load_sharded, shard_loaded
from mlx_dora.errors import DoRAError
from mlx_dora.layers import weight_of
from mlx_dora.layers.sharded import ShardedLinear
from mlx_dora.matrix.packed import QuantizedWeight
from mlx_dora.matrix.sharded import own_rows

LARGE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "vocab_size": 4096,
}


class Member:
    """A process of a group, to code that does not communicate."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size


def member(rank: int, size: int) -> mx.distributed.Group:
    return cast(mx.distributed.Group, Member(rank, size))


def bytes_read() -> int:
    """Bytes that this process has read, from the system's own count."""
    text = Path("/proc/self/io").read_text()
    return int(text.split("rchar: ")[1].split("\n", 1)[0])


def arrays_of(weight: Any) -> list[mx.array]:
    if isinstance(weight, QuantizedWeight):
        return list(weight.parts.values())
    return [weight]


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's count of reads")
@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("rank", [0, 3])
def test_a_process_reads_and_holds_its_own_rows_only(
    make_tiny_folder: Callable[..., Path], bits: int | None, rank: int
) -> None:
    folder = make_tiny_folder(bits=bits, **LARGE)
    model, _ = load(folder)
    sizes = [v.nbytes for _, v in tree_flatten(model.parameters())]  # pyright: ignore[reportAttributeAccessIssue] - arrays
    total, largest = sum(sizes), max(sizes)
    whole = {path: weight_of(m) for path, m in model.named_modules() if "weight" in m}
    expected_fingerprint = fingerprint(model)
    del model
    group = member(rank, 4)
    mx.clear_cache()
    mx.reset_peak_memory()
    held, before = mx.get_active_memory(), bytes_read()
    pending, _ = load_sharded(folder, group)
    read, peak = bytes_read() - before, mx.get_peak_memory() - held
    other = 1 << 17  # the tokenizer, the config, headers and norms
    assert total / 4 <= read <= total / 4 + other
    assert peak <= total / 4 + 2 * largest / 4 + other
    assert len(pending.parts) == 4 * 7 + 1
    for path, part in pending.parts.items():
        own = own_rows(whole[path].shape[0], group)
        for array, every in zip(arrays_of(part), arrays_of(whole[path]), strict=True):
            assert array.dtype == every.dtype
            assert np.array_equal(
                np.array(array.view(mx.uint8)), np.array(every[own].view(mx.uint8))
            )
    assert pending.division.read_whole == ()
    assert fingerprint(pending.model) == expected_fingerprint


def test_what_mlx_lm_changes_is_read_whole_and_named(
    tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_lm.models import llama

    own: Any = llama.Model.sanitize

    def sanitize(self: nn.Module, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        name = "model.layers.1.mlp.up_proj.weight"
        return {**own(self, weights), name: weights[name] * 2}

    monkeypatch.setattr(llama.Model, "sanitize", sanitize)
    model, _ = load(tiny_model_folder)
    pending, _ = load_sharded(tiny_model_folder, member(1, 2))
    assert pending.division.read_whole == ("model.layers.1.mlp.up_proj.weight",)
    (line,) = pending.division.describe(2)[1:]
    assert "model.layers.1.mlp.up_proj.weight" in line
    for path, part in pending.parts.items():
        every = dict(model.named_modules())[path]["weight"]
        assert mx.array_equal(cast(mx.array, part), every[every.shape[0] // 2 :]).item()


def test_renamed_tensors_are_still_read_by_rows(
    tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_lm.models import llama

    path = tiny_model_folder / "model.safetensors"
    tensors = cast(dict[str, mx.array], mx.load(str(path)))
    mx.eval(tensors)
    mx.save_safetensors(str(path), {f"x.{k}": v for k, v in tensors.items()})

    def sanitize(_: nn.Module, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        return {name.removeprefix("x."): value for name, value in weights.items()}

    monkeypatch.setattr(llama.Model, "sanitize", sanitize)
    pending, _ = load_sharded(tiny_model_folder, member(0, 2))
    assert pending.division.read_whole == ()
    part = cast(mx.array, pending.parts["model.layers.0.self_attn.q_proj"])
    assert mx.array_equal(
        part, tensors["model.layers.0.self_attn.q_proj.weight"][:16]
    ).item()


def test_rows_that_cannot_be_divided_stay_whole_and_are_named(
    make_tiny_model: Callable[..., nn.Module],
) -> None:
    model = make_tiny_model(vocab_size=321)
    pending = shard_loaded(model, member(0, 2))
    assert pending.division.whole == ("model.embed_tokens",)
    assert "model.embed_tokens" not in pending.parts
    assert "model.embed_tokens" in pending.division.describe(2)[1]
    with pytest.raises(DoRAError, match="3 processes divide the rows of no weight"):
        shard_loaded(make_tiny_model(vocab_size=320), member(0, 3))


def test_experts_and_adapters_are_refused_by_name(
    make_tiny_model: Callable[..., nn.Module],
) -> None:
    from mlx_lm.models import mixtral

    experts = mixtral.Model(
        mixtral.ModelArgs(
            model_type="mixtral",
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=2,
        )
    )
    with pytest.raises(DoRAError, match=r"experts: .*switch_mlp\.gate_proj"):
        shard_loaded(experts, member(0, 2))
    model = make_tiny_model()
    apply_dora(model, DoRAConfig(rank=2, num_layers=1))
    with pytest.raises(DoRAError, match="adapted layers already"):
        shard_loaded(model, member(0, 2))


def test_code_that_reads_a_divided_weight_is_refused_by_name() -> None:
    part = mx.ones((2, 4))
    module = ShardedLinear.from_part(part, mx.full((4,), 4.0), member(0, 2))
    module.name_as("lm_head")
    with pytest.raises(DoRAError, match="lm_head: the model's own code reads"):
        _ = module.weight
    assert module.whole_weight.shape == (4, 4)
    module.unfreeze()
    assert not tree_flatten(module.trainable_parameters())
