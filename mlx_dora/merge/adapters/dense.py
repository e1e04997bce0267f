r"""Merges adapters through a dense weight: exact magnitude, direction by SVD.

Adapters are not closed under methods that work element by element. Fisher information
by element is such a method:

.. math:: W'_{jk} = \frac{\sum_i w_i F_{ijk} W'_{ijk}}{\sum_i w_i F_{ijk}}

With one number per row, it is a weighted mean of rows, under which adapters are closed
(`mlx_dora.merge.adapters.factored`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from mlx_dora.errors import DoRAError
from mlx_dora.io.finite import all_finite
from mlx_dora.matrix import Adapted, Weight, row_gain
from mlx_dora.matrix.weight import dense, row_norms
from mlx_dora.merge.adapters.factored import (
    NOT_FINITE,
    MergedMatrix,
    merge_matrix,
    single,
)
from mlx_dora.merge.fisher.information import informed_weights
from mlx_dora.merge.methods import METHODS, elementwise
from mlx_dora.merge.methods.blockwise import joined
from mlx_dora.merge.methods.settings import TensorSettings, check_seed

# Below this share of ‖W0‖, the part of a row along W0 is too short to scale the row to
# W0.
_LEANS = 0.1
_SWEEPS = 20


@dataclass(frozen=True, kw_only=True)
class Options:
    """Settings of element-wise methods, besides the weights.

    Attributes:
        density: Fraction of the entries to keep; None for the method's default.
        seed: Random seed of DARE.
        scale: λ on the merged task vectors.
    """

    density: float | None = None
    seed: int = 0
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if not math.isfinite(self.scale):
            raise DoRAError(f"scale must be a finite number, got {self.scale!r}.")

    def given(self) -> list[str]:
        """Names of the settings that differ from their defaults."""
        density = ["density"] if self.density is not None else []
        return [*density, *(["lambda"] if self.scale != 1 else [])]


def merge_dense(
    weight: Weight,
    inputs: Sequence[Adapted],
    shares: np.ndarray,
    *,
    method: str,
    scale: float,
    rank: int | None,
    options: Options,
) -> MergedMatrix:
    """Merge the adapters of one matrix by a method that works on dense tensors.

    Arguments are those of `mlx_dora.merge.adapters.factored.merge_matrix`, and the
    method's settings.

    Raises:
        DoRAError: If weights differ by row, or an adapted row is not finite.
    """
    if np.ptp(shares, axis=0).any():
        raise DoRAError(f"{method} needs one weight per adapter, not one per row.")
    base, rows, magnitudes = _dense_rows(weight, inputs)
    weights = [float(share) for share in shares[0]]
    direction, magnitude = merge_apart(method, base, rows, magnitudes, weights, options)
    rank = rank or _total_rank(inputs)
    return factor(base, direction, magnitude, scale=scale, rank=rank, rescale=False)


def merge_informed(
    weight: Weight,
    inputs: Sequence[Adapted],
    weights: np.ndarray,
    informations: Sequence[mx.array | None],
    *,
    scale: float,
    rank: int | None = None,
) -> MergedMatrix:
    """Merge the adapters of one matrix by their Fisher information.

    Other arguments are those of `mlx_dora.merge.adapters.factored.merge_matrix`.
    `informations` holds the information of each adapter, all ``(out,)`` or all
    ``(out, in)``. If any is None, only the weights count.

    Returns:
        The merged adapter. Elements for which no input has information are merged by
        the weights, and counted in `MergedMatrix.unknown`.

    Raises:
        DoRAError: If weights by row are combined with information by element.
    """
    known = [information for information in informations if information is not None]
    if len(known) < len(informations) or known[0].ndim == 1:
        informed, unknown = informed_weights(weights, informations)
        merged = merge_matrix(
            weight, inputs, informed, method="linear", scale=scale, rank=rank
        )
        return replace(merged, unknown=unknown * weight.shape[1])
    if np.ptp(weights, axis=0).any():
        raise DoRAError(
            "Fisher information by element needs one weight per adapter, not one per "
            "row."
        )
    base, rows, magnitudes = _dense_rows(weight, inputs)
    gains = [
        row_gain(m, row_norm(row)) for m, row in zip(magnitudes, rows, strict=True)
    ]
    rows = [gain[:, None] * row for gain, row in zip(gains, rows, strict=True)]
    merged, unknown = elementwise.fisher(rows, known, [float(w) for w in weights[0]])
    # Estimate W0's share of each row from the mean information. Divided by it, the row
    # is W0 plus an update of about the inputs' ranks.
    informed, _ = informed_weights(weights, [array.mean(axis=1) for array in known])
    parts = informed * np.stack([np.array(g, np.float64) for g in gains], axis=1)
    share, size = parts.sum(1), np.abs(parts).sum(1)
    magnitude = row_norm(merged)
    length = np.array(row_norm(base) / mx.maximum(magnitude, 1e-30), np.float64)
    is_plain = share > _LEANS * size
    factors = np.where(is_plain, 1 / np.where(is_plain, share, 1.0), length)
    made = factor(
        base,
        mx.array(factors[:, None].astype(np.float32)) * merged,
        magnitude,
        scale=scale,
        rank=rank or max(_total_rank(inputs), 1),
        rescale=False,
    )
    return replace(made, unknown=unknown)


def _dense_rows(
    weight: Weight, inputs: Sequence[Adapted]
) -> tuple[mx.array, list[mx.array], list[mx.array]]:
    """W0 in float32, and the rows W0 + s·BA and magnitudes of each input."""
    base = dense(weight).astype(mx.float32)
    rows, magnitudes = [], []
    for adapted in inputs:
        rows.append(base + adapted.update.rows(slice(None)))
        if not all_finite(rows[-1]):
            raise DoRAError(NOT_FINITE)
        magnitudes.append(row_norm(rows[-1]) if adapted.m is None else adapted.m)
    return base, rows, magnitudes


def _total_rank(inputs: Sequence[Adapted]) -> int:
    return sum(adapted.update.rank for adapted in inputs)


def merge_apart(
    method: str,
    base: mx.array,
    directions: Sequence[mx.array],
    magnitudes: Sequence[mx.array],
    weights: Sequence[float],
    options: Options,
) -> tuple[mx.array, mx.array]:
    r"""Merge directions and magnitudes separately by the same element-wise method.

    The directions' task vectors are :math:`V_i - W_0` and the magnitudes'
    :math:`|m_i| - \lVert W_0\rVert`, so a sign
    conflict in one does not affect the other.

    The directions, each ``(out, in)``, are about as long as the rows of the base.

    Returns:
        The unnormalized direction, ``(out, in)``, and the magnitude, ``(out,)``.

    Raises:
        DoRAError: If the density is not between 0 and 1.
    """
    entry = METHODS[method]
    density = entry.density if options.density is None else options.density
    settings = TensorSettings(
        weights=np.array(weights, np.float64),
        density=None if density is None else (density,) * len(directions),
        seed=options.seed,
        scale=options.scale,
    )
    lengths = [mx.abs(m) for m in magnitudes]
    direction, magnitude = (
        joined(entry.block_function(start, tensors, settings), start.shape)
        for start, tensors in ((base, directions), (row_norm(base), lengths))
    )
    return direction, mx.maximum(magnitude, 0.0)


def factor(
    base: mx.array,
    direction: mx.array,
    magnitude: mx.array,
    *,
    scale: float,
    rank: int | None = None,
    energy: float | None = None,
    rescale: bool = True,
) -> MergedMatrix:
    r"""Compute the DoRA adapter nearest to rows of given direction and magnitude.

    Each unit direction u is scaled to :math:`k u`. Initially
    :math:`k = \langle W_0, u\rangle`, which minimizes :math:`k u - W_0`. The truncated
    SVD of that difference (Eckart and Young, 1936) is the update BA. The next iteration
    uses :math:`k = \langle W_0 + BA, u\rangle`, for as long as the loss falls.

    Rows of `direction` may have any length; without `rescale`, k is that length.
    `magnitude` is the length of each merged row, and `energy` a share of the update's
    squared norm to keep.

    Raises:
        DoRAError: If neither `rank` nor `energy` is given, or a row is not finite.
    """
    if rank is None and energy is None:
        raise DoRAError("give rank, energy (a share of the update to keep), or both.")
    start, unit = _finite(base), _finite(direction)
    norm = np.linalg.norm(unit, axis=1)
    unit /= np.where(norm > 0, norm, 1.0)[:, None]
    m = np.where(norm > 0, _float64(magnitude), 0.0)
    along = (start * unit).sum(1)
    target = _first_lengths(start, along, m) if rescale else norm
    gain = _gains(m, target)

    def truncated(length: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
        change = np.where(norm[:, None] > 0, length[:, None] * unit - start, 0.0)
        down, left, lost = _truncate(change * gain, rank, energy)
        return down, left / gain, lost

    lora_a, up, discarded = truncated(target)
    for _ in range(_SWEEPS if rescale else 0):
        # The length k at which this update fits each direction best.
        fitting, before = along + ((unit @ lora_a) * up).sum(1), discarded
        target = np.where(fitting > _LEANS * target, fitting, target)
        lora_a, up, discarded = truncated(target)
        if discarded > 0.99 * before or discarded < 1e-12:
            break
    return MergedMatrix(
        lora_a=single(lora_a),
        lora_b=single((up / scale).T),
        m=single(m),
        scale=scale,
        zero=int((m == 0).sum()),
        discarded=discarded,
    )


def _float64(values: mx.array) -> np.ndarray:
    return np.array(values.astype(mx.float32), np.float64)


def _finite(values: mx.array) -> np.ndarray:
    if not np.isfinite(array := _float64(values)).all():
        raise DoRAError(NOT_FINITE)
    return array


def _gains(m: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Weight of each row's error: m over the direction's length; positive."""
    gain = np.where(target > 0, np.abs(m) / np.where(target > 0, target, 1.0), 1.0)
    return np.maximum(gain, 1e-6 * max(float(gain.max()), 1e-30))[:, None]


def _first_lengths(start: np.ndarray, along: np.ndarray, m: np.ndarray) -> np.ndarray:
    """Length at which each direction is nearest to W0; W0's own length if too short.

    `along` are inner products of W0's rows and the unit directions. Where the row of W0
    is 0, the magnitude is used.
    """
    base_norm = np.linalg.norm(start, axis=1)
    target = np.where(along > _LEANS * base_norm, along, base_norm)
    return np.where(base_norm > 0, target, np.abs(m))


def _truncate(
    matrix: np.ndarray, rank: int | None, energy: float | None
) -> tuple[np.ndarray, np.ndarray, float]:
    """Factors ``(in, r)`` and ``(out, r)`` of the best approximation, and the loss.

    Uses the Gram matrix of the shorter side, so singular values below 1e-8 of the
    largest are noise.
    """
    if not np.isfinite(matrix).all():
        raise DoRAError(NOT_FINITE)
    is_tall = matrix.shape[0] >= matrix.shape[1]
    side = matrix if is_tall else matrix.T  # (long, short)
    squares, vectors = np.linalg.eigh(side.T @ side)
    squares, vectors = np.maximum(squares[::-1], 0.0), vectors[:, ::-1]
    total = float(squares.sum())
    count = len(squares) if rank is None else min(rank, len(squares))
    if energy is not None and total:
        kept = (
            int(np.searchsorted(np.cumsum(squares), energy * total * (1 - 1e-12))) + 1
        )
        count = min(count, kept)
    count = max(1, count if total else 1)
    short = vectors[:, :count]
    long = side @ short
    root = np.sqrt(np.linalg.norm(long, axis=0))
    safe = np.where(root > 0, root, 1.0)
    long, short = long / safe, short * root
    lost = float(squares[count:].sum()) / total if total else 0.0
    down, up = (short, long) if is_tall else (long, short)
    return down, up, lost


def row_norm(weight: mx.array) -> mx.array:
    """Length of each output row, evaluated. Shape ``(out,)``, float32."""
    norm = row_norms(weight)
    mx.eval(norm)
    return norm
