"""Fuses the adapted matrices of a module: one matrix, or each matrix in a stack."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_dora.fuse.config import FuseConfig
from mlx_dora.fuse.layer import measured_fused, requantized, survival
from mlx_dora.fuse.report import Survival, sum_survivals
from mlx_dora.io.finite import all_finite
from mlx_dora.kernels.fusing import dense_fused, packed_fused, scaled_packing
from mlx_dora.matrix.low_rank import Adapted
from mlx_dora.matrix.terms import exact_gain
from mlx_dora.matrix.weight import (
    Weight,
    as_packed,
    dense_dtype,
    matrices,
    stacked,
    unpacked_dtype,
)

_SCALES = {"float32": mx.float32, "float16": mx.float16}


@dataclass(frozen=True, kw_only=True)
class FusedMatrices:
    """The fused weight of a module.

    Attributes:
        weight: The fused weight, with the shape of the base's weight.
        survival: How much of the updates is kept.
        plain: How much the base's own packing would keep, if that was not enough.
        rest: For a lossless fuse, the low-rank part of each matrix: ``lora_a``
            ``(in, r)`` and ``lora_b`` ``(r, out)``.
    """

    weight: Weight
    survival: Survival
    plain: Survival | None
    rest: list[dict[str, mx.array]]

    @property
    def is_finite(self) -> bool:
        """Whether the low-rank part and the survival are finite."""
        sizes = (self.survival.exact_square, self.survival.kept_square)
        return all(map(math.isfinite, sizes)) and all(
            all_finite(value) for factors in self.rest for value in factors.values()
        )


def fuse_matrices(
    weight: Weight,
    adapted: Sequence[Adapted],
    config: FuseConfig,
    own: mx.Dtype = mx.bfloat16,
) -> FusedMatrices:
    """Fuse every matrix of one module.

    Args:
        weight: Base weight, shape ``(out, in)``, or a stack; dense or packed.
        adapted: The DoRA or LoRA adapter of each matrix.
        config: How to fuse packed weights. All matrices in a stack get the bits of the
            matrix that needs most.
        own: The model's dtype, see `unpacked_dtype`.

    Raises:
        DoRAError: If a lossless fuse is requested and the scales cannot hold
            magnitudes.
    """
    befores = matrices(weight)
    afters: list[Weight] = []
    kept: list[Survival] = []
    plains: list[Survival | None] = []
    rest: list[dict[str, mx.array]] = []
    for before, adapter in zip(befores, adapted, strict=True):
        plain, packed = None, as_packed(before)
        if isinstance(before, mx.array):
            after, survived = measured_fused(before, adapter, before.dtype)
        elif packed is None or config.mode == "dequantize":
            after = dense_fused(before, adapter, unpacked_dtype(before, own))
            survived = survival(before, after, adapter)
        elif config.mode == "lossless":
            gain = exact_gain(before, adapter)
            after = scaled_packing(packed, gain, _SCALES[config.scales])
            up = gain * adapter.update.lora_b.astype(mx.float32)
            survived = survival(before, after, adapter, up)
            rest.append({"lora_a": adapter.update.lora_a, "lora_b": up})
        else:
            after, survived, plain = requantized(packed, adapter, config.keep, own)
        afters.append(after)
        kept.append(survived)
        plains.append(plain)
    if len(weight.shape) == 2:
        fused = afters[0]
    else:
        afters, kept = _alike(befores, adapted, afters, kept)
        fused = stacked(afters)
    whole = None
    if any(plains):
        whole = sum_survivals([p or k for p, k in zip(plains, kept, strict=True)])
    return FusedMatrices(
        weight=fused, survival=sum_survivals(kept), plain=whole, rest=rest
    )


def _alike(
    befores: Sequence[Weight],
    adapted: Sequence[Adapted],
    afters: Sequence[Weight],
    kept: Sequence[Survival],
) -> tuple[list[Weight], list[Survival]]:
    """Give all matrices the packing that needs most bits: they share an array."""
    packed = [weight for weight in map(as_packed, afters) if weight is not None]
    dense = [dense_dtype(weight) for weight in afters if as_packed(weight) is None]
    dtype = mx.float32 if mx.float32 in dense else dense[0] if dense else None
    most = max(
        packed, key=lambda weight: (weight.bits, weight.mode == "affine"), default=None
    )
    alike: list[Weight] = []
    survivals: list[Survival] = []
    for before, adapter, after, own in zip(befores, adapted, afters, kept, strict=True):
        form = as_packed(after)
        if dtype is not None:
            is_like = form is None and dense_dtype(after) == dtype
            same = after if is_like else dense_fused(before, adapter, dtype)
        else:
            base = as_packed(before)
            assert most is not None
            assert base is not None
            assert form is not None
            is_like = form.form == most.form
            same = after if is_like else packed_fused(base, adapter, **most.form)
        alike.append(same)
        survivals.append(own if is_like else survival(before, same, adapter))
    return alike, survivals
