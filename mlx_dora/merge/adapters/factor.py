"""Turns a dense adapted weight into an adapter: exact magnitude, direction by SVD."""

import mlx.core as mx
import numpy as np

from mlx_dora.errors import DoRAError
from mlx_dora.matrix.weight import row_norms
from mlx_dora.merge.adapters.factored import NOT_FINITE, MergedMatrix, gains, single

# If the projection onto W0 is below this share of ‖W0‖, the direction is too far from
# W0 to be scaled to it.
_LEANS = 0.1
_SWEEPS = 20


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
    gain = gains(m, target)[:, None]

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
