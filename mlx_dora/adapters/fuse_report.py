"""What fusing did to each layer, and how much of its update survived packing."""

import math
from dataclasses import dataclass
from typing import cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_dora.adapters.surgery import DoRAModule
from mlx_dora.kernels import QuantizedWeight, fused_weight
from mlx_dora.kernels.rows import row_blocks
from mlx_dora.layers import weight_of

# Below this share, or cosine, a fuse back into few bits is worth a warning.
_KEPT_WELL = 0.9


@dataclass(frozen=True, kw_only=True)
class FusedLayer:
    """One layer that was fused.

    Attributes:
        path: Its full path.
        dtype: Of the fused weight, unpacked: ``"bfloat16"``.
        bits: Bits a weight if it is packed again, None if it is dense.
        bytes_before: Size of the base module.
        bytes_after: Size of the fused module.
        kept: Share of the update left after packing: its projection onto the exact
            update, 1 if all of it is there. None for a dense layer.
        cosine: Between the update after packing and the exact one; below 1 by what
            packing adds as noise. None for a dense layer.
    """

    path: str
    dtype: str
    bits: int | None
    bytes_before: int
    bytes_after: int
    kept: float | None
    cosine: float | None


@dataclass(frozen=True, kw_only=True)
class FuseReport:
    """What a fuse did, layer by layer in natural order."""

    layers: tuple[FusedLayer, ...]

    @property
    def bytes_before(self) -> int:
        """Size of the base modules together."""
        return sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        """Size of the fused modules together."""
        return sum(layer.bytes_after for layer in self.layers)

    @property
    def lossy(self) -> tuple[FusedLayer, ...]:
        """The layers that lost a tenth of their update, or buried it in noise."""
        return tuple(
            layer
            for layer in self.layers
            if layer.kept is not None
            and layer.cosine is not None
            and min(layer.kept, layer.cosine) < _KEPT_WELL
        )

    def lines(self) -> list[str]:
        """The report as text: a line a layer that was packed again, and a summary."""
        found = [
            f"{layer.path}: {layer.bits} bits, {layer.kept:.1%} of the update kept "
            f"(cosine {layer.cosine:.3f})"
            for layer in self.layers
            if layer.kept is not None
        ]
        dtypes = ", ".join(sorted({layer.dtype for layer in self.layers}))
        found.append(
            f"Fused {len(self.layers)} layers ({dtypes}): {self.bytes_before:,} bytes "
            f"before, {self.bytes_after:,} after."
        )
        return found


def describe_fused(path: str, layer: DoRAModule, module: nn.Module) -> FusedLayer:
    """Compare a DoRA layer with the plain module it was fused into."""
    before, after = weight_of(layer.base), weight_of(module)
    bits = kept = cosine = None
    if isinstance(after, QuantizedWeight):
        bits = after.bits
        kept, cosine = _survival(layer, before, after)
        dtype = after.rows(slice(0, 1)).dequantize().dtype
    else:
        dtype = after.dtype
    return FusedLayer(
        path=path,
        dtype=str(dtype).rpartition(".")[2],
        bits=bits,
        bytes_before=_nbytes(layer.base),
        bytes_after=_nbytes(module),
        kept=kept,
        cosine=cosine,
    )


def _survival(
    layer: DoRAModule, before: mx.array | QuantizedWeight, after: QuantizedWeight
) -> tuple[float, float]:
    """How much of the update W' − W0 is in what was packed, and how pure."""
    lora_a, lora_b = layer.factors()
    exact_square = product = packed_square = 0.0
    for index, block in row_blocks(before):
        base = block.astype(mx.float32)
        adapted = fused_weight(
            base, lora_a, lora_b[:, index], layer.scale, layer.m[index]
        )
        exact = adapted - base
        packed = after.rows(index).dequantize().astype(mx.float32) - base
        sums = mx.stack(
            [mx.sum(exact * exact), mx.sum(exact * packed), mx.sum(packed * packed)]
        )
        sums = cast(list[float], sums.tolist())
        exact_square += sums[0]
        product += sums[1]
        packed_square += sums[2]
    if exact_square == 0:  # an untrained adapter has nothing to lose
        return 1.0, 1.0
    cosine = 0.0
    if packed_square > 0:
        cosine = product / math.sqrt(exact_square * packed_square)
    return product / exact_square, cosine


def _nbytes(module: nn.Module) -> int:
    values = [cast(mx.array, value) for _, value in tree_flatten(module.parameters())]
    return sum(value.nbytes for value in values)
