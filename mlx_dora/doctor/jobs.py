"""Each op on given sizes, by its kernel and by plain MLX: to check and to time.

Results are independent of ``MLX_DORA_KERNELS``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_dora.doctor import traffic
from mlx_dora.kernels import plain
from mlx_dora.kernels.adapted_norm import launched as launched_norm
from mlx_dora.kernels.fused_weight import launched as launched_fused
from mlx_dora.kernels.normalize_rows import launched as launched_rows
from mlx_dora.kernels.rescale import launched as launched_scale
from mlx_dora.matrix.packed import QuantizedWeight
from mlx_dora.matrix.weight import Weight, row_squares

_SCALE = 0.5


@dataclass(frozen=True, kw_only=True)
class Job:
    """One call, with its inputs made.

    Attributes:
        name: Op and what of it, as in ``adapted_norm 4-bit``.
        dtype: Type of the large operands.
        arrays: Arguments of both functions.
        kernel: Launches the kernel; fails where MLX has no GPU.
        reference: Plain MLX.
        traffic: What the kernel moves.
    """

    name: str
    dtype: mx.Dtype
    arrays: tuple[mx.array, ...]
    kernel: Callable[..., Any]
    reference: Callable[..., Any]
    traffic: traffic.Traffic


def normalize_rows_job(shape: tuple[int, int], dtype: mx.Dtype) -> Job:
    """Rescale the rows of a weight."""
    return Job(
        name="normalize_rows",
        dtype=dtype,
        arrays=(_normal(*shape, dtype=dtype), _normal(shape[0], seed=1)),
        kernel=launched_rows,
        reference=plain.normalize_rows,
        traffic=traffic.normalize_rows_traffic(shape, dtype),
    )


def adapted_norm_job(
    shape: tuple[int, int],
    r: int,
    dtype: mx.Dtype,
    bits: int | None = None,
    group_size: int = 64,
) -> Job:
    """Norms of a dense weight, or of one packed in `bits`.

    The reference is given ‖W‖² as training has it, computed once for all steps.
    """
    out, width = shape
    weight: Weight = _normal(*shape, dtype=dtype)
    if bits is None:
        parts = (weight,)
        moved = traffic.adapted_norm_traffic(shape, r, dtype)
    else:
        values, scales, *biases = mx.quantize(weight, group_size, bits)
        parts = (values, scales, biases[0])
        moved = traffic.adapted_norm_packed_traffic(shape, r, bits, group_size, dtype)

    def whole(*parts: mx.array) -> Weight:
        if bits is None:
            return parts[0]
        return QuantizedWeight(
            weight=parts[0],
            scales=parts[1],
            biases=parts[2],
            group_size=group_size,
            bits=bits,
        )

    def by_kernel(a: mx.array, b: mx.array, _: mx.array, *parts: mx.array) -> mx.array:
        return launched_norm(whole(*parts), a, b, _SCALE)

    def by_reference(
        a: mx.array, b: mx.array, squared: mx.array, *parts: mx.array
    ) -> mx.array:
        return plain.adapted_norm(whole(*parts), a, b, _SCALE, squared_base=squared)

    factors = (_normal(width, r, seed=1), _normal(r, out, seed=2))
    return Job(
        name="adapted_norm" if bits is None else f"adapted_norm {bits}-bit",
        dtype=dtype,
        arrays=(*factors, row_squares(whole(*parts)), *parts),
        kernel=by_kernel,
        reference=by_reference,
        traffic=moved,
    )


def fused_weight_job(shape: tuple[int, int], r: int, dtype: mx.Dtype) -> Job:
    """The adapted weight of a dense one."""
    out, width = shape

    def by_kernel(w: mx.array, a: mx.array, b: mx.array, m: mx.array) -> mx.array:
        return launched_fused(w, a, b, _SCALE, m)

    def by_reference(w: mx.array, a: mx.array, b: mx.array, m: mx.array) -> mx.array:
        return plain.fused_weight(w, a, b, _SCALE, m)

    return Job(
        name="fused_weight",
        dtype=dtype,
        arrays=(
            _normal(*shape, dtype=dtype),
            _normal(width, r, seed=1),
            _normal(r, out, seed=2),
            _normal(out, seed=3),
        ),
        kernel=by_kernel,
        reference=by_reference,
        traffic=traffic.fused_weight_traffic(shape, r, dtype),
    )


def dora_scale_job(
    shape: tuple[int, int], r: int, dtype: mx.Dtype, backward: bool = False
) -> Job:
    """Scaled outputs of ``(tokens, out)``, or these and all gradients."""
    tokens, out = shape
    arrays = (
        _normal(tokens, out, dtype=dtype),
        _normal(tokens, r, seed=1, dtype=dtype),
        _normal(r, out, seed=2),
        _normal(out, seed=3),
    )
    pull = _normal(tokens, out, seed=5, dtype=dtype)

    def by(op: Callable[..., mx.array]) -> Callable[..., Any]:
        def forward(y: mx.array, h: mx.array, up: mx.array, gain: mx.array) -> mx.array:
            return op(y, h, up, gain, None)

        def with_gradients(pull: mx.array, *inputs: mx.array) -> list[list[mx.array]]:
            outputs, gradients = mx.vjp(forward, list(inputs), [pull])
            return [outputs, gradients]

        return with_gradients if backward else forward

    moved = traffic.dora_scale_traffic(shape, r, dtype)
    if backward:
        more = traffic.dora_scale_backward_traffic(shape, dtype, False)
        moved = traffic.Traffic(
            large=moved.large + more.large, rereads=moved.rereads, cached=moved.cached
        )
    return Job(
        name="dora_scale and gradients" if backward else "dora_scale",
        dtype=dtype,
        arrays=(pull, *arrays) if backward else arrays,
        kernel=by(launched_scale),
        reference=by(plain.rescale),
        traffic=moved,
    )


def _normal(*shape: int, seed: int = 0, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)
