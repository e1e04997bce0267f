"""A packed weight as one value, and products with it that suit the device."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import mlx.core as mx

# On CPU `mx.quantized_matmul` runs at about 1 GMAC/s whatever the number of rows, while
# unpacking costs about 5 ns a weight and the dense product next to nothing. Unpacking
# wins from about five rows on; below `_CPU_SMALL_WORK` multiply-adds the difference is
# under 2 ms and the base layer's own op is kept, so that results equal it bit for bit.
_CPU_PACKED_ROWS = 4
_CPU_SMALL_WORK = 1 << 21


@dataclass(frozen=True, kw_only=True)
class QuantizedWeight:
    """A weight packed by `mx.quantize`; of a stack, all have a leading axis.

    Attributes:
        weight: Packed values. Shape ``(out, in * bits / 32)``, uint32.
        scales: One per group. Shape ``(out, in / group_size)``; a float dtype in mode
            ``affine``, uint8 in the others.
        biases: As `scales` in mode ``affine``, otherwise None.
        group_size: Columns that share a scale.
        bits: Bits of a packed value.
        mode: ``affine``, ``mxfp4``, ``mxfp8`` or ``nvfp4``.
    """

    weight: mx.array
    scales: mx.array
    biases: mx.array | None
    group_size: int
    bits: int
    mode: str = "affine"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape ``(out, in)`` of the weight this stands for."""
        *rows, words = self.weight.shape
        return *rows, words * 32 // self.bits

    @property
    def form(self) -> dict[str, Any]:
        """How it is packed: ``group_size``, ``bits`` and ``mode``."""
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}

    @property
    def parts(self) -> dict[str, mx.array]:
        """Its arrays by the names they have in a module; no ``biases`` if None."""
        parts = {"weight": self.weight, "scales": self.scales}
        return parts if self.biases is None else parts | {"biases": self.biases}

    def rows(self, index: slice | mx.array) -> "QuantizedWeight":
        """The same weight restricted to some output rows."""
        return QuantizedWeight(
            weight=self.weight[index],
            scales=self.scales[index],
            biases=None if self.biases is None else self.biases[index],
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
        )

    def dequantize(self) -> mx.array:
        """The dense weight in MLX's dtype for it: `scales`', or bfloat16."""
        return mx.dequantize(
            self.weight,
            self.scales,
            self.biases,
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
        )

    def matmul(self, x: mx.array) -> mx.array:
        r"""Product :math:`x W^\top` by the faster path of the device.

        Args:
            x: Shape ``(..., in)``.

        Returns:
            Shape ``(..., out)``, in the dtype MLX gives the product.
        """
        if unpacks(x, self.shape):
            run = _dequantized_matmul(self.group_size, self.bits, self.mode)
            return run(x, self.weight, self.scales, self.biases)
        return self.packed_matmul(x)

    def packed_matmul(self, x: mx.array) -> mx.array:
        """The same product by MLX's own op, never unpacked as a whole; stacks too."""
        return mx.quantized_matmul(
            x,
            self.weight,
            scales=self.scales,
            biases=self.biases,
            transpose=True,
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
        )


def unpacks(x: mx.array, shape: tuple[int, ...]) -> bool:
    """Whether a product with a packed ``(out, in)`` weight unpacks it first."""
    rows = x.size // max(x.shape[-1], 1)
    if rows <= _CPU_PACKED_ROWS or rows * shape[0] * shape[1] <= _CPU_SMALL_WORK:
        return False
    return mx.default_device().type == mx.DeviceType.cpu


@lru_cache
def _dequantized_matmul(
    group_size: int, bits: int, mode: str
) -> Callable[..., mx.array]:
    """``x @ W.T`` that unpacks W in each direction and keeps it in neither."""

    def unpack(
        w: mx.array, scales: mx.array, biases: mx.array | None, after: mx.array
    ) -> mx.array:
        # Without the link to `after` this would depend on constants alone: `mx.compile`
        # would merge it with every other unpacking of w (that of the backward pass,
        # or of a checkpoint's second forward pass) and keep the result between them.
        (w,) = mx.depends([w], [after])
        return mx.dequantize(
            w, scales, biases, group_size=group_size, bits=bits, mode=mode
        )

    @mx.custom_function
    def run(
        x: mx.array, w: mx.array, scales: mx.array, biases: mx.array | None
    ) -> mx.array:
        return x @ unpack(w, scales, biases, x).T

    @run.vjp
    def run_vjp(primals, cotangent, _output):
        x, w, scales, biases = primals
        dx = (cotangent @ unpack(w, scales, biases, cotangent)).astype(x.dtype)
        constants = (w, scales, biases)  # frozen: no gradient
        return dx, *(None if c is None else mx.zeros_like(c) for c in constants)

    return cast(Callable[..., mx.array], run)
