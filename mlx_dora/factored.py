"""Norms and inner products of adapted rows from factored terms, without a dense W'.

What inference, fuse, analysis and merging share (`docs/method.md`, "Factored terms").
All of it is float32, read row block by row block, and evaluates as it goes; training
uses `mlx_dora.kernels.adapted_norm` instead.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_dora.kernels.quantized import QuantizedWeight
from mlx_dora.kernels.reference import check_factors, update_terms
from mlx_dora.kernels.rows import (
    Weight,
    are_ordinary,
    beyond_squares,
    matrices,
    near_one,
    row_blocks,
)

# Under this share of ‖W0‖² + s²‖BA‖² the factored sum may be off by more than 1e-5.
_RECOMPUTE_BELOW = 2.0**-6
# Elements of a float32 block where not even a mid-sized matrix may be copied whole.
_GRAM_BLOCK = 1 << 18


@dataclass(frozen=True, kw_only=True)
class FactoredTerms:
    """Inner products of each row of W0 with its update. All ``(out,)`` float32.

    Attributes:
        scale: Multiplier s of the update BA.
        squared_base: q0 = ‖W0‖².
        cross: c = ⟨W0, BA⟩.
        squared_update: p = ‖BA‖².
        norm: n = ‖W0 + s·BA‖, right for every finite row; the other terms are squares,
            which over- or underflow outside norms of about 1e-19 to 1e19.
        recomputed: Rows that nearly cancel, whose norm was taken from the dense row.
    """

    scale: float
    squared_base: mx.array
    cross: mx.array
    squared_update: mx.array
    norm: mx.array
    recomputed: int


def factored_terms(
    weight: Weight, lora_a: mx.array, lora_b: mx.array, scale: float
) -> FactoredTerms:
    """Inner products of one adapted matrix, W0 read once.

    Args:
        weight: Base weight. Shape ``(out, in)``, any float dtype or packed.
        lora_a: Shape ``(in, r)``.
        lora_b: Shape ``(r, out)``.
        scale: Multiplier of the update.

    Returns:
        The terms, evaluated. Rows whose update cancels all but an eighth of their
        length are recomputed densely and counted.

    Raises:
        DoRAError: If the shapes do not fit together.
    """
    check_factors(weight.shape, lora_a, lora_b)
    a, columns = near_one(lora_a.astype(mx.float32), axis=0)
    up = lora_b.astype(mx.float32) * columns.T
    squares, products = [], []
    for _, block in row_blocks(weight):
        full = block.astype(mx.float32)
        squares.append(mx.square(full).sum(axis=1))
        products.append(full @ a)
        mx.eval(squares[-1], products[-1])
    q0 = mx.concatenate(squares)
    c, p = update_terms(mx.concatenate(products), a, up)
    squared = q0 + (2 * scale) * c + (scale * scale) * p
    total = q0 + (scale * scale) * p
    norm = mx.sqrt(mx.maximum(squared, 0.0))
    noisy = squared < _RECOMPUTE_BELOW * total
    dense = noisy | mx.isnan(squared)
    if not are_ordinary(total):
        dense = dense | beyond_squares(total)
    mx.eval(q0, c, p, norm, noisy, dense)
    rows = np.flatnonzero(np.array(dense))
    if rows.size:
        norm[mx.array(rows)] = mx.array(
            _dense_norms(weight, lora_a, lora_b, scale, rows)
        )
        mx.eval(norm)
    return FactoredTerms(
        scale=scale,
        squared_base=q0,
        cross=c,
        squared_update=p,
        norm=norm,
        recomputed=int(noisy.sum()),
    )


def _dense_norms(
    weight: Weight, lora_a: mx.array, lora_b: mx.array, scale: float, rows: np.ndarray
) -> np.ndarray:
    """‖W0 + s·BA‖ of some rows, summed in float64. Shape ``(len(rows),)``, float32."""
    a = np.array(lora_a.astype(mx.float32), np.float64)
    b = scale * np.array(lora_b.astype(mx.float32), np.float64).T
    found = []
    for index in np.array_split(rows, -(-rows.size * len(a) // _GRAM_BLOCK) or 1):
        base = np.array(float32_rows(weight, mx.array(index)), np.float64)
        found.append(np.linalg.norm(base + b[index] @ a.T, axis=1))
    with np.errstate(over="ignore"):
        return np.concatenate(found).astype(np.float32)


def base_products(
    weight: Weight, lora_a: mx.array, elements: int
) -> tuple[np.ndarray, np.ndarray]:
    """‖W0‖² of each row, and W0·A, in float64. Shapes ``(out,)``, ``(out, r)``.

    Products are float32, of rows and columns near 1 where squares might not be.

    Args:
        weight: Base weight. Shape ``(out, in)``, any float dtype or packed.
        lora_a: Shape ``(in, r)``.
        elements: Of a block in which the weight is read.
    """
    down, columns = near_one(lora_a.astype(mx.float32), axis=0)
    squares, products = [np.zeros(0)], [np.zeros((0, down.shape[1]))]
    for _, block in row_blocks(weight, elements):
        full, power = block.astype(mx.float32), None
        total = mx.square(full).sum(axis=1)
        if not are_ordinary(total):
            full, power = near_one(full, axis=1)
        product = full @ down
        values = np.array(full, copy=False)
        # Squares rounded once each, summed in float64: 1e-9 of the sum.
        square = np.square(values).sum(axis=1, dtype=np.float64)
        product = np.array(product, np.float64)
        if power is not None:
            factor = np.array(power, np.float64)
            square, product = square * factor[:, 0] ** 2, product * factor
        squares.append(square)
        products.append(product)
    whole = np.concatenate(products) * np.array(columns, np.float64)
    return np.concatenate(squares), whole


def float32_rows(weight: Weight, index: mx.array) -> mx.array:
    """Some output rows of a weight, dense or packed. Shape ``(len(index), in)``."""
    if isinstance(weight, QuantizedWeight):
        return weight.rows(index).dequantize().astype(mx.float32)
    return weight[index].astype(mx.float32)


def one_minus_cosine(base: mx.array, norm: mx.array, update: mx.array) -> mx.array:
    r"""1 − cos of the angle between the sides `base` and `norm` of a triangle.

    .. math:: 1 - \cos\theta = \frac{d^2 - (n - b)^2}{2 b n}

    The law of cosines for W0, W0 + sBA and sBA, so that lengths alone will do; its form
    keeps a small angle that b² + n² − d² would lose.

    Args:
        base: b = ‖W0‖ of each row. Shape ``(out,)``.
        norm: n = ‖W0 + sBA‖. Shape ``(out,)``.
        update: d = ‖sBA‖. Shape ``(out,)``.

    Returns:
        Between 0 and 2; 0 where a side is zero. Shape ``(out,)``.
    """
    change = norm - base
    product = base * norm
    raw = (update - change) * (update + change) / mx.where(product > 0, 2 * product, 1)
    return mx.where(product > 0, mx.clip(raw, 0.0, 2.0), 0.0)


@dataclass(frozen=True, kw_only=True)
class Update:
    """A low-rank update s·BA of a base weight.

    Attributes:
        lora_a: Shape ``(in, r)``; r may be 0.
        lora_b: Shape ``(r, out)``.
        scale: Multiplier s.
    """

    lora_a: mx.array
    lora_b: mx.array
    scale: float


@dataclass(frozen=True, kw_only=True)
class AdaptedMatrix:
    """One adapter's share in one matrix, or in a stack: all with a leading axis.

    Attributes:
        update: Its low-rank update.
        m: Magnitudes, ``(out,)``; None for LoRA, whose rows keep their own length.
    """

    update: Update
    m: mx.array | None

    def matrices(self) -> list["AdaptedMatrix"]:
        """Of a stack, each matrix's share; else this one."""
        if self.update.lora_a.ndim == 2:
            return [self]
        return [
            AdaptedMatrix(
                update=Update(
                    lora_a=self.update.lora_a[i],
                    lora_b=self.update.lora_b[i],
                    scale=self.update.scale,
                ),
                m=None if self.m is None else self.m[i],
            )
            for i in range(self.update.lora_a.shape[0])
        ]


def stack_norms(weight: Weight, update: Update, squared_base: mx.array) -> mx.array:
    """`factored_terms(...).norm` of every matrix of a stack.

    Args:
        weight: The stack. Shape ``(n, out, in)``, any float dtype or packed.
        update: Its updates, A ``(n, in, r)`` and B ``(n, r, out)``.
        squared_base: ‖W0‖² of each row. Shape ``(n, out)``, float32.

    Returns:
        The norms, evaluated. Shape ``(n, out)``, float32.
    """
    a, s = update.lora_a.astype(mx.float32), update.scale
    products = []
    for one, down in zip(matrices(weight), a.swapaxes(-1, -2), strict=True):
        if isinstance(one, QuantizedWeight):
            products.append(one.matmul(down))
        else:  # one after the other: no float32 copy of the stack
            products.append(down @ one.astype(mx.float32).T)
    c, p = mx.vmap(update_terms)(mx.stack(products).swapaxes(-1, -2), a, update.lora_b)
    squared = squared_base + (2 * s) * c + (s * s) * p
    norm = mx.sqrt(mx.maximum(squared, 0.0))
    total = squared_base + (s * s) * p
    noisy = (squared < _RECOMPUTE_BELOW * total) | mx.isnan(squared)
    if not are_ordinary(total):
        noisy = noisy | beyond_squares(total)
    found = np.flatnonzero(np.array(noisy.any(axis=1))).tolist()
    for i in found:
        one = matrices(weight)[i]
        terms = factored_terms(one, update.lora_a[i], update.lora_b[i], s)
        norm[i] = terms.norm
    mx.eval(norm)
    return norm


@dataclass(frozen=True, kw_only=True)
class RowGrams:
    """Inner products of the rows of N adapted weights over one base, in float64.

    Attributes:
        inner: ``inner[j, i, k]`` is ⟨W0 + s_i·B_iA_i, W0 + s_k·B_kA_k⟩ of row j. Shape
            ``(out, N, N)``.
        base_norm: ‖W0‖ of each row. Shape ``(out,)``.
        recomputed: Rows in which an update nearly cancels the base, taken densely.
    """

    inner: np.ndarray
    base_norm: np.ndarray
    recomputed: int


def row_grams(weight: Weight, updates: Sequence[Update]) -> RowGrams:
    r"""Inner products of every pair of adapted rows, W0 read once.

    .. math:: \langle V_i, V_k \rangle_j = q_0 + s_i c_i + s_k c_k + s_i s_k
        (B_i^\top A_i^\top A_k B_k)_{jj}

    with q0 and c as in `FactoredTerms`. W0·A is float32, row block by row block; what
    is small (ranks, pairs) is summed in float64. No ``(out, in)`` array is built.

    Args:
        weight: Base weight. Shape ``(out, in)``, any float dtype or packed.
        updates: The N updates.

    Raises:
        DoRAError: If the shapes do not fit together.
    """
    for one in updates:
        check_factors(weight.shape, one.lora_a, one.lora_b)
    stacked = mx.concatenate([one.lora_a.astype(mx.float32) for one in updates], axis=1)
    q0, product = base_products(weight, stacked, _GRAM_BLOCK)  # (out,), (out, Σr)
    a = np.array(stacked, np.float64)
    ends = np.cumsum([0, *(one.lora_a.shape[1] for one in updates)])
    spans = [slice(*ends[i : i + 2]) for i in range(len(updates))]
    ups = [
        one.scale * np.array(one.lora_b.astype(mx.float32), np.float64).T
        for one in updates
    ]
    cross = [(product[:, span] * b).sum(1) for span, b in zip(spans, ups, strict=True)]
    gram = a.T @ a
    count = len(updates)
    inner = np.empty((q0.size, count, count))
    noisy = np.zeros(q0.size, bool)
    for i in range(count):
        for k in range(i, count):
            both = ((ups[i] @ gram[spans[i], spans[k]]) * ups[k]).sum(1)
            inner[:, i, k] = inner[:, k, i] = q0 + cross[i] + cross[k] + both
            if i == k:
                noisy |= inner[:, i, i] < _RECOMPUTE_BELOW * (q0 + both)
    rows = np.flatnonzero(noisy & (q0 > 0))
    if rows.size:
        base = np.array(float32_rows(weight, mx.array(rows)), np.float64)
        dense = np.stack(
            [base + b[rows] @ a[:, s].T for b, s in zip(ups, spans, strict=True)], 1
        )
        inner[rows] = dense @ dense.transpose(0, 2, 1)
    return RowGrams(inner=inner, base_norm=np.sqrt(q0), recomputed=int(rows.size))
