"""DoRA's forward epilogue: the last step of every adapted layer, with gradients."""

from collections.abc import Callable
from typing import Any, cast

import mlx.core as mx

from mlx_dora.errors import DoRAError
from mlx_dora.kernels import plain
from mlx_dora.kernels.case import DORA_SCALE, Case
from mlx_dora.kernels.choice import takes_on_gpu
from mlx_dora.kernels.dispatch import KERNELS, run, select
from mlx_dora.kernels.plans import (
    plan_dora_scale,
    plan_dora_scale_backward,
    plan_dora_scale_columns,
)
from mlx_dora.kernels.trial import Job, normal
from mlx_dora.matrix.terms import row_gain

_FORWARD = KERNELS["dora_scale"]
_BACKWARD = KERNELS["dora_scale_backward"]
_COLUMNS = KERNELS["dora_scale_columns"]


def launched(
    y: mx.array,
    h: mx.array,
    up: mx.array,
    gain: mx.array,
    offset: mx.array | None = None,
    scale: float = 1.0,
) -> mx.array:
    """Run the kernel for any size; differentiable."""
    r, out = up.shape
    rows, low = y.reshape(-1, out), h.astype(y.dtype).reshape(-1, r)
    scaled = up if scale == 1 else scale * up
    composed = cast(mx.array, _differentiable(rows, low, scaled, gain, offset))
    return composed.reshape(y.shape)


@mx.custom_function
def _differentiable(
    y: mx.array, h: mx.array, up: mx.array, gain: mx.array, offset: mx.array | None
) -> mx.array:
    has_offset = offset is not None
    (composed,) = run(
        _FORWARD,
        (y, h, up, gain, offset if has_offset else gain),
        plan_dora_scale(_matrix(y), h.shape[1], y.dtype, has_offset),
    )
    return composed


@_differentiable.vjp
def _vjp(primals: Any, cotangent: mx.array, output: mx.array) -> Any:
    y, h, up, gain, offset = primals
    has_offset = offset is not None
    scaled, partial = run(
        _BACKWARD,
        (cotangent, output, gain, offset if has_offset else gain),
        plan_dora_scale_backward(_matrix(y), y.dtype, has_offset),
    )
    (sums,) = run(_COLUMNS, (partial, gain), plan_dora_scale_columns(*partial.shape))
    # A sum over tokens can exceed the range of float16, but not of bfloat16.
    wide = mx.float32 if y.dtype == mx.float16 else y.dtype
    pull = scaled.astype(wide)
    return (
        scaled,
        (pull @ up.astype(wide).T).astype(h.dtype),
        (h.astype(wide).T @ pull).astype(mx.float32),
        sums[0],
        None if offset is None else sums[1],
    )


@_differentiable.vmap
def _vmap(inputs: Any, axes: Any) -> tuple[mx.array, int]:
    # MLX has no rule for custom kernels. Plain MLX serves, gradients included.
    if inputs[-1] is not None:
        return mx.vmap(plain.compose, in_axes=axes)(*inputs), 0

    def without_offset(
        y: mx.array, h: mx.array, up: mx.array, gain: mx.array
    ) -> mx.array:
        return plain.compose(y, h, up, gain, None)

    return mx.vmap(without_offset, in_axes=axes[:-1])(*inputs[:-1]), 0


def _matrix(y: mx.array) -> tuple[int, int]:
    tokens, out = y.shape
    return tokens, out


def job(case: Case) -> Job:
    """Return both sides of a case; a training step is compiled, decoding is not."""
    tokens, out, r, dtype = case.rows, case.columns, case.rank, case.dtype

    def inputs(seed: int) -> tuple[mx.array, ...]:
        arrays = [
            normal(tokens, out, seed=seed, dtype=dtype),
            normal(tokens, r, seed=seed + 1, dtype=dtype),
            normal(r, out, seed=seed + 2),
            1 + 0.1 * normal(out, seed=seed + 3),
        ]
        if case.has_offset:
            arrays.insert(3, 0.1 * normal(out, seed=seed + 4))
        if case.has_gradients:
            arrays.append(normal(tokens, out, seed=seed + 5, dtype=dtype))
        return tuple(arrays)

    def side(op: Callable[..., mx.array]) -> Callable[..., Any]:
        def forward(
            y: mx.array, h: mx.array, up: mx.array, *rest: mx.array
        ) -> mx.array:
            *offset, gain = rest
            return op(y, h, up, gain, offset[0] if offset else None)

        def with_gradients(*arrays: mx.array) -> tuple[list[mx.array], list[mx.array]]:
            *primals, pull = arrays
            return mx.vjp(forward, primals, [pull])

        return with_gradients if case.has_gradients else forward

    op = plain.rescale if case.has_gradients else plain.compose
    return Job(
        inputs=inputs,
        kernel=side(launched),
        plain=side(op),
        linked=3 + case.has_offset,  # the gain
        is_compiled=case.has_gradients,
    )


def _takes(has_gradients: bool) -> Callable[..., bool]:
    def takes(
        is_forced: bool,
        y: mx.array,
        h: mx.array,
        up: mx.array,
        gain: mx.array,
        offset: mx.array | None,
        _scale: float = 1.0,
    ) -> bool:
        if gain.ndim != 1:  # a variant with one gain for all rows
            return False
        (r, out), has_offset = up.shape, offset is not None
        # By position, which takes half the time.
        tokens = y.size // out
        case = Case(
            DORA_SCALE, y.dtype, tokens, out, r, 0, 0, has_offset, has_gradients
        )
        return takes_on_gpu(is_forced, case, job)

    return takes


rescale = select(plain.rescale, launched, _takes(True))
r"""Add the low-rank part, rescale every output, and add an offset.

.. math:: o = g \circ (y + s\,h\,U) + \mathrm{offset}

It is differentiable in all arrays. The gradient of g needs only the output:
:math:`dg_j = \sum_t do_{tj} (o_{tj} - \mathrm{offset}_j) / g_j`; at g = 0 it is defined
as 0.

Args:
    y: Base output. Shape ``(..., out)``, any float dtype.
    h: Low-rank activation x·A. Shape ``(..., r)``.
    up: Up projection B. Shape ``(r, out)``, float32.
    gain: g = m/n. Shape ``(out,)``, float32.
    offset: Offset to add, shape ``(out,)``, float32, or None.
    scale: Multiplier s of the low-rank part.

Returns:
    Output, shape ``(..., out)``, in the dtype of `y`; computed in float32 and rounded
    once.
"""

compose = select(plain.compose, launched, _takes(False))
"""Compute `rescale` for inference; gradients work, but take more memory."""


def dora_scale(
    y: mx.array,
    h: mx.array,
    lora_b: mx.array,
    scale: float,
    m: mx.array,
    norm: mx.array,
    bias: mx.array | None = None,
) -> mx.array:
    r"""Add the low-rank part, rescale every output, and add the bias.

    .. math:: o = g \circ (y + s \, h B) + b, \qquad g = m / n

    This is Eq. 5 of DoRA (arXiv:2402.09353) on activations. It is differentiable in y,
    h, lora_b, m and bias; the norm is a constant (section 4.3). At m = 0 the gradient
    of m is defined as 0.

    Args:
        y: Base output W0·x. Shape ``(..., out)``, any float dtype.
        h: Low-rank activation x·A. Shape ``(..., r)``.
        lora_b: Up projection. Shape ``(r, out)``.
        scale: Multiplier of the low-rank update.
        m: Magnitudes. Shape ``(out,)``, float32.
        norm: Norms of the adapted rows, see `adapted_norm`. Shape ``(out,)``, float32.
        bias: Bias of the base, shape ``(out,)``, or None.

    Returns:
        Output, shape ``(..., out)``, in the dtype of `y`; computed in float32 and
        rounded once. A row of norm 0 gives only its bias.

    Raises:
        DoRAError: If the shapes do not fit together.
    """
    _check_shapes(y, h, lora_b, m, norm, bias)
    gain = row_gain(m, mx.stop_gradient(norm.astype(mx.float32)))
    offset = None if bias is None else bias.astype(mx.float32)
    return rescale(y, h, lora_b.astype(mx.float32), gain, offset, scale)


def _check_shapes(
    y: mx.array,
    h: mx.array,
    lora_b: mx.array,
    m: mx.array,
    norm: mx.array,
    bias: mx.array | None,
) -> None:
    r, out = lora_b.shape
    rows = {"m": m.shape, "norm": norm.shape, "last axis of y": y.shape[-1:]}
    if bias is not None:
        rows["bias"] = bias.shape
    wrong = [
        f"{name} has shape {shape}" for name, shape in rows.items() if shape != (out,)
    ]
    if h.shape != (*y.shape[:-1], r):
        wrong.append(f"h has shape {h.shape}, expected {(*y.shape[:-1], r)}")
    if wrong:
        raise DoRAError(f"lora_b of shape {(r, out)} does not fit: {'; '.join(wrong)}.")
