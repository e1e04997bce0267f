"""A packed weight, with matrix products that are fast on the current device."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import mlx.core as mx

# On CPU, `mx.quantized_matmul` runs at about 1 GMAC/s for any number of rows. Unpacking
# costs about 5 ns per weight and the dense product very little, so that unpacking is
# faster for five or more rows. Below `_CPU_SMALL_WORK` multiply-adds the difference is
# less than 2 ms. There the base layer's op is used, which gives bit-identical results.
_CPU_PACKED_ROWS = 4
_CPU_SMALL_WORK = 1 << 21


@dataclass(frozen=True, kw_only=True)
class QuantizedWeight:
    """A weight packed by `mx.quantize`. Arrays of a stack have a leading axis.

    Attributes:
        weight: Packed values. Shape ``(out, in * bits / 32)``, uint32.
        scales: One scale per group. Shape ``(out, in / group_size)``; a float dtype in
            mode ``affine``, otherwise uint8.
        biases: One bias per group in mode ``affine``, like `scales`; otherwise None.
        group_size: Number of columns that share a scale.
        bits: Bits per packed value.
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
        """Shape ``(out, in)`` of the unpacked weight."""
        *rows, words = self.weight.shape
        return *rows, words * 32 // self.bits

    @property
    def form(self) -> dict[str, Any]:
        """Packing parameters: ``group_size``, ``bits`` and ``mode``."""
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}

    @property
    def parts(self) -> dict[str, mx.array]:
        """The arrays by their names in a module, without ``biases`` if None."""
        parts = {"weight": self.weight, "scales": self.scales}
        return parts if self.biases is None else parts | {"biases": self.biases}

    def rows(self, index: slice | mx.array) -> "QuantizedWeight":
        """Return this weight restricted to some output rows."""
        return QuantizedWeight(
            weight=self.weight[index],
            scales=self.scales[index],
            biases=None if self.biases is None else self.biases[index],
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
        )

    def dequantize(self) -> mx.array:
        """Return the dense weight, in the dtype of `scales` or bfloat16."""
        return mx.dequantize(
            self.weight,
            self.scales,
            self.biases,
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
        )

    def matmul(self, x: mx.array) -> mx.array:
        r"""Return :math:`x W^\top`, computed in the faster way on this device.

        Args:
            x: Input, shape ``(..., in)``.

        Returns:
            The product, shape ``(..., out)``, in MLX's dtype for it.
        """
        if unpacks(x, self.shape):
            run = _dequantized_matmul(self.group_size, self.bits, self.mode)
            return run(x, self.weight, self.scales, self.biases)
        return self.packed_matmul(x)

    def packed_matmul(self, x: mx.array) -> mx.array:
        """Return the product by MLX's op, without unpacking W; accepts stacks."""
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
    """Return whether a product with a packed ``(out, in)`` weight unpacks it first."""
    rows = x.size // max(x.shape[-1], 1)
    if rows <= _CPU_PACKED_ROWS or rows * shape[0] * shape[1] <= _CPU_SMALL_WORK:
        return False
    return mx.default_device().type == mx.DeviceType.cpu


@lru_cache
def _dequantized_matmul(
    group_size: int, bits: int, mode: str
) -> Callable[..., mx.array]:
    """Return a function for ``x @ W.T`` that keeps no unpacked W.

    The forward and the backward pass each unpack W.
    """

    def unpack(
        w: mx.array, scales: mx.array, biases: mx.array | None, after: mx.array
    ) -> mx.array:
        # Without the dependency on `after`, this would depend only on constants:
        # `mx.compile` would merge it with other unpackings of w (in the backward pass
        # or in a recomputed forward pass) and keep the result in between.
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
