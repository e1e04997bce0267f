"""A stack of adapted experts as a plain stack, one expert after the other."""

from dataclasses import dataclass

import mlx.core as mx

from mlx_dora.adapters.fuse_config import FuseConfig
from mlx_dora.adapters.fuse_layer import (
    Update,
    dense_fused,
    dtype_of,
    packed_fused,
    requantized,
    survival,
)
from mlx_dora.adapters.fuse_report import Survival, sum_survivals
from mlx_dora.errors import DoRAError
from mlx_dora.kernels import QuantizedWeight
from mlx_dora.kernels.rows import Weight


@dataclass(frozen=True, kw_only=True)
class FusedExperts:
    """What came of a stack.

    Attributes:
        weight: The fused experts, arrays with a leading axis of experts.
        survival: How much of their updates is left.
        plain: The same for the base's own packing, where that was not enough.
    """

    weight: Weight
    survival: Survival
    plain: Survival | None = None


def fuse_experts(weight: Weight, update: Update, config: FuseConfig) -> FusedExperts:
    """Fuse every expert of one module.

    Args:
        weight: The experts, ``(experts, out, in)`` or packed.
        update: In the layout of experts: A ``(experts, r, in)``, B
            ``(experts, out, r)``, m ``(experts, out)``.
        config: What to do with packed weights; all experts get the bits of the one
            that needs most.

    Raises:
        DoRAError: If a packed stack is to be fused losslessly: mlx-lm's LoRA for
            experts could hold the rest, but nothing here writes it yet.
    """
    updates = [_update_of(update, index) for index in range(update.m.shape[0])]
    befores = [_expert(weight, index) for index in range(len(updates))]
    plains: list[Survival | None] = []
    if not isinstance(weight, QuantizedWeight) or config.mode == "dequantize":
        afters: list[Weight] = [
            dense_fused(one, change, dtype_of(one))
            for one, change in zip(befores, updates, strict=True)
        ]
    elif config.mode == "lossless":
        raise DoRAError("packed experts cannot be fused losslessly yet; requantize.")
    else:
        afters = []
        for one, change in zip(befores, updates, strict=True):
            assert isinstance(one, QuantizedWeight)
            after, _, plain = requantized(one, change, config.keep)
            afters.append(after)
            plains.append(plain)
        afters = _alike(befores, updates, afters)
    kept = [
        survival(one, after, change)
        for one, after, change in zip(befores, afters, updates, strict=True)
    ]
    plain = None
    if any(plains):
        plain = sum_survivals([p or k for p, k in zip(plains, kept, strict=True)])
    return FusedExperts(
        weight=_stack(afters), survival=sum_survivals(kept), plain=plain
    )


def _update_of(update: Update, index: int) -> Update:
    return Update(
        lora_a=update.lora_a[index].T,
        lora_b=update.lora_b[index].T,
        scale=update.scale,
        m=update.m[index],
    )


def _expert(weight: Weight, index: int) -> Weight:
    chosen = mx.array(index)
    return (
        weight.rows(chosen) if isinstance(weight, QuantizedWeight) else weight[chosen]
    )


def _alike(
    befores: list[Weight], updates: list[Update], afters: list[Weight]
) -> list[Weight]:
    """All experts in the form of the one that needs most: they share one array."""
    dense = [one for one in afters if not isinstance(one, QuantizedWeight)]
    if dense:
        is_full = any(one.dtype == mx.float32 for one in dense)
        dtype = mx.float32 if is_full else dense[0].dtype
        return [
            dense_fused(one, change, dtype)
            for one, change in zip(befores, updates, strict=True)
        ]
    packed = [one for one in afters if isinstance(one, QuantizedWeight)]
    most = max(packed, key=lambda one: one.bits)
    found: list[Weight] = []
    for before, change, after in zip(befores, updates, packed, strict=True):
        form = after.group_size, after.bits, after.mode
        if form != (most.group_size, most.bits, most.mode):
            assert isinstance(before, QuantizedWeight)
            after = packed_fused(
                before, change,
                group_size=most.group_size, bits=most.bits, mode=most.mode,
            )  # fmt: skip
        found.append(after)
    return found


def _stack(weights: list[Weight]) -> Weight:
    first = weights[0]
    if not isinstance(first, QuantizedWeight):
        return mx.stack([one for one in weights if isinstance(one, mx.array)])
    packed = [one for one in weights if isinstance(one, QuantizedWeight)]
    biases = [one.biases for one in packed if one.biases is not None]
    return QuantizedWeight(
        weight=mx.stack([one.weight for one in packed]),
        scales=mx.stack([one.scales for one in packed]),
        biases=mx.stack(biases) if biases else None,
        group_size=first.group_size,
        bits=first.bits,
        mode=first.mode,
    )
