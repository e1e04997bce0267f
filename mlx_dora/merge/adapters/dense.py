"""From a dense adapted weight back to an adapter: magnitude exact, direction by SVD."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_dora.errors import DoRAError
from mlx_dora.matrix.weight import row_norms
from mlx_dora.merge.adapters.factored import NOT_FINITE, MergedMatrix, single
from mlx_dora.merge.methods import method_named
from mlx_dora.merge.methods.blockwise import joined
from mlx_dora.merge.methods.settings import TensorSettings, check_seed

# Below this share of ‖W0‖ the new direction leans too far from W0 to be scaled to it.
_LEANS = 0.1
_SWEEPS = 20


@dataclass(frozen=True, kw_only=True)
class Options:
    """What element-wise methods take beside the weights.

    Attributes:
        density: Share of the entries to keep; None for the method's default.
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
        """Names of the settings that are not left at their defaults."""
        density = ["density"] if self.density is not None else []
        return [*density, *(["lambda"] if self.scale != 1 else [])]


def merge_task_vectors(
    method: str,
    base: mx.array,
    tensors: Sequence[mx.array],
    weights: Sequence[float],
    options: Options,
) -> mx.array:
    """Merge tensors of any shape by a method that works on dense tensors.

    Raises:
        DoRAError: For a density that is no share.
    """
    entry = method_named(method)
    density = entry.density if options.density is None else options.density
    settings = TensorSettings(
        weights=np.array(weights, np.float64),
        density=None if density is None else (density,) * len(tensors),
        seed=options.seed,
        scale=options.scale,
    )
    return joined(entry.block_function(base, tensors, settings), base.shape)


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
        method: A method that works on dense tensors.
        base: W0. Shape ``(out, in)``.
        directions: N directions V_i, of about the base's length. Of its shape.
        magnitudes: N of shape ``(out,)``.
        weights: N weights.
        options: Of the method.

    Returns:
        The direction, unnormalised, ``(out, in)``, and the magnitude, ``(out,)``.
    """
    direction = merge_task_vectors(method, base, directions, weights, options)
    lengths = [mx.abs(m) for m in magnitudes]
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
    :math:`k = \langle W_0, u\rangle`, which makes :math:`k u - W_0` smallest; its
    truncated SVD (Eckart and Young, 1936) is the update BA, and
    :math:`k = \langle W_0 + BA, u\rangle` for the next try, while the loss falls.

    Args:
        base: W0. Shape ``(out, in)``.
        direction: Of any length. Shape ``(out, in)``.
        magnitude: Shape ``(out,)``.
        scale: Multiplier that the update is written for; not 0.
        rank: Largest rank.
        energy: Share of the squared norm that the rank must hold.
        rescale: False takes the directions in the length they have.

    Raises:
        DoRAError: If neither `rank` nor `energy` is given, or a row is not finite.
    """
    if rank is None and energy is None:
        raise DoRAError("give a rank or an energy to keep.")
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
        # The length at which this update fits each direction best.
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
    """How much each row's error counts: m over the direction's length, above 0."""
    gain = np.where(target > 0, np.abs(m) / np.where(target > 0, target, 1.0), 1.0)
    return np.maximum(gain, 1e-6 * max(float(gain.max()), 1e-30))[:, None]


def _first_lengths(start: np.ndarray, along: np.ndarray, m: np.ndarray) -> np.ndarray:
    """The length of each direction that is nearest to W0, or W0's where that is short.

    Args:
        start: W0. Shape ``(out, in)``.
        along: Products of W0's rows and the unit directions. Shape ``(out,)``.
        m: Magnitudes, for rows where W0 is 0. Shape ``(out,)``.
    """
    base_norm = np.linalg.norm(start, axis=1)
    target = np.where(along > _LEANS * base_norm, along, base_norm)
    return np.where(base_norm > 0, target, np.abs(m))


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
