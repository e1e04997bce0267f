"""A module's adapted matrices as plain ones: one, or a stack, one after the other."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_dora.adapters.fuse_config import FuseConfig
from mlx_dora.adapters.fuse_layer import (
    Update,
    dense_fused,
    folded,
    packed_fused,
    requantized,
    survival,
    unpacked_dtype,
)
from mlx_dora.adapters.fuse_report import Survival, sum_survivals
from mlx_dora.io.finite import all_finite
from mlx_dora.kernels import QuantizedWeight
from mlx_dora.kernels.rows import Weight, matrices, stacked

_SCALES = {"float32": mx.float32, "float16": mx.float16}


@dataclass(frozen=True, kw_only=True)
class FusedMatrices:
    """What came of a module's weight.

    Attributes:
        weight: The fused weight, of the shape that it had.
        survival: How much of its updates is left.
        plain: The same for the base's own packing, where that was not enough.
        rest: Of a lossless fuse, ``lora_a`` ``(in, r)`` and ``lora_b`` ``(r, out)`` of
            what stays beside each matrix.
    """

    weight: Weight
    survival: Survival
    plain: Survival | None
    rest: list[dict[str, mx.array]]

    @property
    def is_finite(self) -> bool:
        """Whether what stays beside, and how much survived, are numbers."""
        sizes = (self.survival.exact_square, self.survival.kept_square)
        return all(map(math.isfinite, sizes)) and all(
            all_finite(value) for one in self.rest for value in one.values()
        )


def fuse_matrices(
    weight: Weight,
    updates: Sequence[Update],
    config: FuseConfig,
    own: mx.Dtype = mx.bfloat16,
) -> FusedMatrices:
    """Fuse every matrix of one module.

    Args:
        weight: ``(out, in)``, or a stack; dense or packed.
        updates: One a matrix.
        config: What to do with packed weights; a whole stack gets the bits of the
            matrix that needs most.
        own: The model's dtype, see `unpacked_dtype`.

    Raises:
        DoRAError: If a packing without scales for magnitudes is to be fused losslessly.
    """
    befores = matrices(weight)
    afters: list[Weight] = []
    kept: list[Survival] = []
    plains: list[Survival | None] = []
    rest: list[dict[str, mx.array]] = []
    for one, update in zip(befores, updates, strict=True):
        plain = None
        if not isinstance(one, QuantizedWeight) or config.mode == "dequantize":
            after = dense_fused(one, update, unpacked_dtype(one, own))
            found = survival(one, after, update)
        elif config.mode == "lossless":
            gain = update.gain(one)
            after = folded(one, gain, _SCALES[config.scales])
            up = gain * update.lora_b.astype(mx.float32)
            found = survival(one, after, update, up)
            rest.append({"lora_a": update.lora_a, "lora_b": up})
        else:
            after, found, plain = requantized(one, update, config.keep, own)
        afters.append(after)
        kept.append(found)
        plains.append(plain)
    if len(weight.shape) == 2:
        fused = afters[0]
    else:
        afters, kept = _alike(befores, updates, afters, kept)
        fused = stacked(afters)
    whole = None
    if any(plains):
        whole = sum_survivals([p or k for p, k in zip(plains, kept, strict=True)])
    return FusedMatrices(
        weight=fused, survival=sum_survivals(kept), plain=whole, rest=rest
    )


def _alike(
    befores: Sequence[Weight],
    updates: Sequence[Update],
    afters: Sequence[Weight],
    kept: Sequence[Survival],
) -> tuple[list[Weight], list[Survival]]:
    """All matrices in the form of the one that needs most: they share one array."""
    dense = [one.dtype for one in afters if not isinstance(one, QuantizedWeight)]
    dtype = mx.float32 if mx.float32 in dense else dense[0] if dense else None
    packed = [one for one in afters if isinstance(one, QuantizedWeight)]
    most = max(packed, key=lambda one: (one.bits, one.mode == "affine"), default=None)
    found: list[Weight] = []
    survivals: list[Survival] = []
    for before, update, after, own in zip(befores, updates, afters, kept, strict=True):
        if dtype is not None:
            is_like = not isinstance(after, QuantizedWeight) and after.dtype == dtype
            alike = after if is_like else dense_fused(before, update, dtype)
        else:
            assert most is not None
            assert isinstance(before, QuantizedWeight)
            form = {n: getattr(most, n) for n in ("group_size", "bits", "mode")}
            is_like = all(getattr(after, n) == value for n, value in form.items())
            alike = after if is_like else packed_fused(before, update, **form)
        found.append(alike)
        survivals.append(own if is_like else survival(before, alike, update))
    return found, survivals
