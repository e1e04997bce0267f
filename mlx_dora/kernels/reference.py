"""Every op in plain MLX: the specification that a hand-written kernel must meet.

Shapes as MLX stores them: weight ``(out, in)``, lora_a ``(in, r)``, lora_b
``(r, out)``. The paper's column norm is the norm of each output row here.
"""

from functools import partial
from typing import cast

import mlx.core as mx

from mlx_dora.errors import DoRAError
from mlx_dora.kernels.quantized import QuantizedWeight
from mlx_dora.kernels.rows import (
    Weight,
    are_ordinary,
    near_one,
    row_blocks,
    row_squares,
)

# Below this share of ‖W0‖² + s²‖BA‖² the factored sum is rounding noise.
_NOISE_FLOOR = 2.0**-20


def normalize_rows(
    weight: mx.array, magnitude: mx.array | None = None
) -> tuple[mx.array, mx.array]:
    r"""Rescale each output row to a given length.

    .. math:: m_j \, W_j / \lVert W_j \rVert_2

    Eq. 2 of DoRA (arXiv:2402.09353), read right to left.

    Args:
        weight: Shape ``(out, in)``, any float dtype.
        magnitude: Length of each row. Shape ``(out,)``; None stands for 1.

    Returns:
        The rescaled weight, ``(out, in)`` in the dtype of `weight`, rounded once, and
        the row norms, ``(out,)`` float32, right for every finite row (inf only where
        the norm itself is beyond float32). A zero row stays zero.

    Raises:
        DoRAError: If `magnitude` does not have one entry a row.
    """
    check_magnitude(weight, magnitude)
    full, power = weight.astype(mx.float32), None
    squares = mx.square(full).sum(axis=1)  # over a row: one norm per output
    if full.size and not are_ordinary(squares):
        full, power = near_one(full, axis=1)
        squares = mx.square(full).sum(axis=1)
    norm = mx.sqrt(squares)
    target = mx.ones_like(norm) if magnitude is None else magnitude
    gain = row_gain(target, norm)
    rescaled = (gain[:, None] * full).astype(weight.dtype)
    return rescaled, norm if power is None else norm * power[:, 0]


def row_gain(magnitude: mx.array, norm: mx.array) -> mx.array:
    """The factor g = m / n of each row, float32; 0 where the norm is 0."""
    safe = mx.where(norm > 0, norm, 1.0)
    return mx.where(norm > 0, magnitude.astype(mx.float32) / safe, 0.0)


def update_terms(
    product: mx.array, lora_a: mx.array, lora_b: mx.array
) -> tuple[mx.array, mx.array]:
    r"""Per row :math:`c = \langle W_0, BA\rangle` and :math:`p = \lVert BA \rVert^2`.

    Section 3 of "Scaling DoRA" (arXiv:2603.22276): only ``(out, r)`` and ``(r, r)``
    arrays are built.

    Args:
        product: U = W0·A. Shape ``(out, r)``, float32.
        lora_a: Shape ``(in, r)``.
        lora_b: Shape ``(r, out)``.

    Returns:
        c and p, each ``(out,)`` float32.
    """
    a = lora_a.astype(mx.float32)
    b = lora_b.astype(mx.float32).T  # (out, r)
    cross = (product * b).sum(axis=1)
    if a.shape[1] > a.shape[0]:  # of no use, and r² would be larger than the weight
        return cross, mx.square(b @ a.T).sum(axis=1)
    gram = a.T @ a  # (r, r)
    return cross, ((b @ gram) * b).sum(axis=1)


def adapted_norm(
    weight: Weight,
    lora_a: mx.array,
    lora_b: mx.array,
    scale: float,
    *,
    squared_base: mx.array | None = None,
) -> mx.array:
    r"""Norm of each row of the adapted weight, without building that weight.

    .. math:: n_j = \lVert W_j + s \, (B A)_j \rVert_2

    The denominator of Eq. 5 in DoRA (arXiv:2402.09353); a constant in the backward
    pass (section 4.3), so no gradient flows through it. Factored as in
    `update_terms`; W·A is taken in the dtype of a dense weight, all else in float32.

    Args:
        weight: Frozen base weight. Shape ``(out, in)``, any float dtype or packed.
        lora_a: Down projection. Shape ``(in, r)``.
        lora_b: Up projection. Shape ``(r, out)``.
        scale: Multiplier of the low-rank update.
        squared_base: ``‖W‖²`` of each row, if known. Shape ``(out,)``, float32. Who
            gives it vouches that no square over- or underflows: norms from about 1e-9
            to 1e18. Without it the norms are right for every finite input.

    Returns:
        Norms in float32, never below 2⁻¹⁰ of ``(‖W‖² + s²‖BA‖²)^½``, under which the
        factored sum is noise. Shape ``(out,)``.

    Raises:
        DoRAError: If the shapes do not fit together.
    """
    check_factors(weight.shape, lora_a, lora_b)
    lora_a, lora_b = mx.stop_gradient(lora_a), mx.stop_gradient(lora_b)
    if squared_base is None:
        squared_base = row_squares(weight)
        largest = mx.abs(lora_a).max(axis=0).astype(mx.float32)
        sizes = mx.concatenate([squared_base, largest * largest])
        if not are_ordinary(sizes) or not mx.abs(lora_b).max() < 1e15:
            return mx.stop_gradient(_scaled_norm(weight, lora_a, lora_b, scale))
    if isinstance(weight, QuantizedWeight):
        product = weight.matmul(lora_a.T.astype(mx.float32)).T
    else:
        product = weight @ lora_a.astype(weight.dtype)
    c, p = update_terms(product.astype(mx.float32), lora_a, lora_b)
    return mx.stop_gradient(factored_norm(squared_base, c, p, scale))


def factored_norm(
    squared_base: mx.array, c: mx.array, p: mx.array, scale: float
) -> mx.array:
    """‖W0 + s·BA‖ from ‖W0‖², c and p of `update_terms`, floored at the noise."""
    squared = squared_base + (2 * scale) * c + (scale * scale) * p
    floor = _NOISE_FLOOR * (squared_base + (scale * scale) * p)
    return mx.sqrt(mx.maximum(squared, floor))


def _scaled_norm(
    weight: Weight, lora_a: mx.array, lora_b: mx.array, scale: float
) -> mx.array:
    """`adapted_norm` with every row of W and BA, and column of A, brought near 1."""
    down, columns = near_one(lora_a.astype(mx.float32), axis=0)
    up = lora_b.astype(mx.float32).T * columns
    up, up_power = near_one(scale * up, axis=1)
    squares, products, powers = [], [], []
    for _, block in row_blocks(weight):
        rows, power = near_one(block.astype(mx.float32), axis=1)
        squares.append(mx.square(rows).sum(axis=1))
        products.append(rows @ down)
        powers.append(power)
    product, power = mx.concatenate(products), mx.concatenate(powers)
    c, p = update_terms(product, down, up.T)
    larger = mx.maximum(power, up_power)
    share, up_share = ((one / larger)[:, 0] for one in (power, up_power))
    norm = factored_norm(
        mx.concatenate(squares) * share * share,
        c * share * up_share,
        p * up_share * up_share,
        1.0,
    )
    return norm * larger[:, 0]


def fused_weight(
    weight: Weight, lora_a: mx.array, lora_b: mx.array, scale: float, m: mx.array
) -> mx.array:
    r"""The adapted weight itself, for fuse and export.

    .. math:: W'_j = m_j \, (W + s B A)_j / \lVert (W + s B A)_j \rVert_2

    Eq. 5 of DoRA (arXiv:2402.09353). Arithmetic in float32, row block by row block,
    with one rounding at the end.

    Args:
        weight: Base weight. Shape ``(out, in)``, any float dtype or packed.
        lora_a: Shape ``(in, r)``.
        lora_b: Shape ``(r, out)``.
        scale: Multiplier of the low-rank update.
        m: Magnitudes. Shape ``(out,)``.

    Returns:
        Shape ``(out, in)``, in the dtype of `weight` (of its unpacked form if packed).

    Raises:
        DoRAError: If the shapes do not fit together.
    """
    check_factors(weight.shape, lora_a, lora_b)
    a = lora_a.astype(mx.float32).T
    b = scale * lora_b.astype(mx.float32).T
    rows = []
    for index, block in row_blocks(weight):
        rescaled, _ = normalize_rows(
            block.astype(mx.float32) + b[index] @ a, m[index].astype(mx.float32)
        )
        rows.append(rescaled.astype(block.dtype))
    return rows[0] if len(rows) == 1 else mx.concatenate(rows)


@partial(mx.compile, shapeless=True)
def _rescale(
    y: mx.array, low_rank: mx.array, gain: mx.array, bias: mx.array | None
) -> mx.array:
    out = gain * (y.astype(mx.float32) + low_rank)
    return (out if bias is None else out + bias).astype(y.dtype)


def compose(
    y: mx.array, h: mx.array, up: mx.array, gain: mx.array, bias: mx.array | None
) -> mx.array:
    """``g∘(y + h·up) + b`` in float32, rounded once to the dtype of `y`.

    Args:
        y: Shape ``(..., out)``.
        h: Shape ``(..., r)``.
        up: s·B, or B with s in `h`. Shape ``(r, out)``, float32.
        gain: Shape ``(out,)``, float32.
        bias: Shape ``(out,)`` float32, or None.
    """
    h = h.astype(mx.float32)
    if y.dtype != mx.float32:
        return _rescale(y, h @ up, gain, bias)
    out = gain * mx.addmm(y, h, up)  # the sum costs no pass of its own
    return out if bias is None else out + bias


@mx.custom_function
def _dora_scale(
    y: mx.array,
    h: mx.array,
    lora_b: mx.array,
    scale: mx.array,
    m: mx.array,
    norm: mx.array,
    bias: mx.array | None,
) -> mx.array:
    h = scale * h.astype(mx.float32)
    return compose(y, h, lora_b.astype(mx.float32), row_gain(m, norm), bias)


@_dora_scale.vjp
def _dora_scale_vjp(primals, cotangent, output):
    y, h, lora_b, scale, m, norm, bias = primals
    axes = list(range(y.ndim - 1))
    dy = cotangent.astype(mx.float32)
    scaled = row_gain(m, norm) * dy
    rows = scaled.reshape(-1, scaled.shape[-1])
    low = h.reshape(-1, h.shape[-1]).astype(mx.float32)
    out = output.astype(mx.float32)
    # dm = Σ dy·u/n, and g·u is the output before the bias: the output is enough.
    unscaled = dy * (out if bias is None else out - bias)
    safe = mx.where(m != 0, m, 1.0)
    dm = mx.where(m != 0, unscaled.sum(axis=axes) / safe, 0.0)
    return (
        scaled.astype(y.dtype),
        (scale * (scaled @ lora_b.astype(mx.float32).T)).astype(h.dtype),
        (scale * (low.T @ rows)).astype(lora_b.dtype),
        mx.zeros_like(scale),  # MLX drops None, and would shift the rest
        dm.astype(m.dtype),
        mx.zeros_like(norm),
        None if bias is None else dy.sum(axis=axes).astype(bias.dtype),
    )


def dora_scale(
    y: mx.array,
    h: mx.array,
    lora_b: mx.array,
    scale: float,
    m: mx.array,
    norm: mx.array,
    bias: mx.array | None = None,
) -> mx.array:
    r"""Add the low-rank part, rescale every output, add the bias.

    .. math:: o = g \circ (y + s \, h B) + b, \qquad g = m / n

    Eq. 5 of DoRA (arXiv:2402.09353) on activations. Differentiable in y, h, lora_b, m
    and bias, with the norm a constant (section 4.3). The gradient of m needs the
    output alone: :math:`dm_j = \sum_t do_{tj} (o_{tj} - b_j) / m_j`. At m = 0 it is
    defined as 0.

    Args:
        y: Base output W0·x. Shape ``(..., out)``, any float dtype.
        h: Low-rank activation x·A. Shape ``(..., r)``.
        lora_b: Up projection. Shape ``(r, out)``.
        scale: Multiplier of the low-rank update.
        m: Magnitudes. Shape ``(out,)``, float32.
        norm: Norms of the adapted rows, see `adapted_norm`. Shape ``(out,)``, float32.
        bias: Shape ``(out,)``, or None.

    Returns:
        Shape ``(..., out)`` in the dtype of `y`: float32 inside, rounded once. A row of
        norm 0 gives its bias alone.

    Raises:
        DoRAError: If the shapes do not fit together.
    """
    check_scale(y, h, lora_b, m, norm, bias)
    factor = mx.array(scale, dtype=mx.float32)
    return cast(mx.array, _dora_scale(y, h, lora_b, factor, m, norm, bias))


def check_magnitude(weight: mx.array, magnitude: mx.array | None) -> None:
    """Refuse a magnitude that has not one entry for each row of the weight."""
    if magnitude is not None and magnitude.shape != weight.shape[:1]:
        raise DoRAError(
            f"magnitude has shape {magnitude.shape}; a weight of shape "
            f"{weight.shape} needs {weight.shape[:1]}."
        )


def check_scale(
    y: mx.array,
    h: mx.array,
    lora_b: mx.array,
    m: mx.array,
    norm: mx.array,
    bias: mx.array | None,
) -> None:
    """Refuse arrays of `dora_scale` that do not fit together."""
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


def check_factors(shape: tuple[int, ...], lora_a: mx.array, lora_b: mx.array) -> None:
    """Refuse low-rank factors that do not fit a weight of shape ``(out, in)``."""
    out, width = shape
    if (
        lora_a.ndim != 2
        or lora_b.ndim != 2
        or lora_a.shape[0] != width
        or lora_b.shape[1] != out
        or lora_a.shape[1] != lora_b.shape[0]
    ):
        raise DoRAError(
            f"lora_a {lora_a.shape} and lora_b {lora_b.shape} do not fit a weight of "
            f"shape {(out, width)}; expected ({width}, r) and (r, {out})."
        )
