"""From a dense adapted weight back to an adapter: magnitude exact, direction by SVD."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_dora.errors import DoRAError
from mlx_dora.matrix.weight import row_norms
from mlx_dora.merge import methods
from mlx_dora.merge.factored import NOT_FINITE, MergedMatrix, single
from mlx_dora.merge.names import ELEMENTWISE

# Below this share of ‖W0‖ the new direction leans too far from W0 to be scaled to it.
_LEANS = 0.1
_SWEEPS = 20
_TIES_DENSITY = 0.2  # the paper's
_DARE_DENSITY = 0.5


@dataclass(frozen=True, kw_only=True)
class Options:
    """What element-wise methods take beside the weights.

    Attributes:
        density: Share of the entries that ties, dare and dare_ties keep; None for each
            method's default.
        seed: Of dare's random numbers.
        scale: λ on the merged task vectors.
    """

    density: float | None = None
    seed: int = 0
    scale: float = 1.0


def merge_task_vectors(
    method: str,
    base: mx.array,
    tensors: Sequence[mx.array],
    weights: Sequence[float],
    options: Options,
) -> mx.array:
    """Merge tensors of any shape by an element-wise method of `mlx_dora.merge.methods`.

    Raises:
        DoRAError: For another method.
    """
    scale, density = options.scale, options.density
    if method == "tsv":
        return methods.tsv(base, tensors, weights, scale=scale)
    if method == "ties":
        share = _TIES_DENSITY if density is None else density
        return methods.ties(base, tensors, weights, density=share, scale=scale)
    drops: dict[str, Callable[..., mx.array]] = {
        "dare": methods.dare,
        "dare_ties": methods.dare_ties,
    }
    if method not in drops:
        raise DoRAError(f"no element-wise method {method!r}: {', '.join(ELEMENTWISE)}.")
    share = _DARE_DENSITY if density is None else density
    return drops[method](
        base, tensors, weights, density=share, seed=options.seed, scale=scale
    )


def merge_apart(
    method: str,
    base: mx.array,
    directions: Sequence[mx.array],
    magnitudes: Sequence[mx.array],
    weights: Sequence[float],
    options: Options,
) -> tuple[mx.array, mx.array]:
    r"""Merge directions by an element-wise method, and magnitudes apart by the same.

    The directions' task vectors are :math:`V_i - W_0` and the magnitudes'
    :math:`|m_i| - \lVert W_0\rVert`, so that a conflict of signs in the one says
    nothing of the other.

    Args:
        method: One of `ELEMENTWISE`.
        base: W0. Shape ``(out, in)``.
        directions: N directions V_i, of about the base's length. Of its shape.
        magnitudes: N of shape ``(out,)``.
        weights: N weights.
        options: Of the method.

    Returns:
        The direction, unnormalised, ``(out, in)``, and the magnitude, ``(out,)``.
    """
    direction = merge_task_vectors(method, base, directions, weights, options)
    lengths = [mx.abs(one) for one in magnitudes]
    magnitude = merge_task_vectors(method, row_norm(base), lengths, weights, options)
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
    r"""The DoRA adapter nearest to rows of given direction and magnitude.

    Each unit direction u is scaled to :math:`k u`, at first with
    :math:`k = \langle W_0, u\rangle`, which makes :math:`k u - W_0` smallest; the
    truncated SVD of that (Eckart and Young, 1936) is the update BA, and
    :math:`k = \langle W_0 + BA, u\rangle` for the next try, while the loss falls. The
    magnitude is kept.

    Args:
        base: W0. Shape ``(out, in)``.
        direction: Of any length. Shape ``(out, in)``.
        magnitude: Shape ``(out,)``.
        scale: Multiplier that the update is written for; not 0.
        rank: Largest rank.
        energy: Keep the smallest rank that holds this share of the squared norm.
        rescale: False takes the directions in the length they have.

    Raises:
        DoRAError: If neither `rank` nor `energy` is given.
    """
    if rank is None and energy is None:
        raise DoRAError("give a rank or an energy to keep.")
    start = np.array(base.astype(mx.float32), np.float64)
    unit = np.array(direction.astype(mx.float32), np.float64)
    if not all(np.isfinite(one).all() for one in (start, unit)):
        raise DoRAError(NOT_FINITE)
    norm = np.linalg.norm(unit, axis=1)
    unit /= np.where(norm > 0, norm, 1.0)[:, None]
    m = np.where(norm > 0, np.array(magnitude.astype(mx.float32), np.float64), 0.0)
    base_norm = np.linalg.norm(start, axis=1)
    has_row = (norm > 0)[:, None]
    along = (start * unit).sum(1)
    target = np.where(along > _LEANS * base_norm, along, base_norm)
    target = np.where(base_norm > 0, target, np.abs(m)) if rescale else norm
    gain = np.where(target > 0, np.abs(m) / np.where(target > 0, target, 1.0), 1.0)
    gain = np.maximum(gain, 1e-6 * max(float(gain.max()), 1e-30))[:, None]

    def truncated(length: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
        change = np.where(has_row, length[:, None] * unit - start, 0.0)
        down, left, lost = _truncate(change * gain, rank, energy)
        return down, left / gain, lost

    lora_a, up, discarded = truncated(target)
    for _ in range(_SWEEPS if rescale else 0):
        # The length at which this update fits each direction best.
        fitting = along + ((unit @ lora_a) * up).sum(1)
        target = np.where(fitting > _LEANS * target, fitting, target)
        before = discarded
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


def _truncate(
    matrix: np.ndarray, rank: int | None, energy: float | None
) -> tuple[np.ndarray, np.ndarray, float]:
    """Factors ``(in, r)`` and ``(out, r)`` of the best approximation, and the loss.

    From the Gram matrix of the shorter side: single values below 1e-8 of the largest
    are noise.
    """
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
