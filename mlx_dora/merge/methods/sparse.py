r"""Methods that drop entries of the changes :math:`\tau_i = W_i - W_0`.

The rest is summed (``dare``, ``breadcrumbs``, ``della_linear``), or first a sign is
elected for each element, as TIES does (``ties``, ``dare_ties``, ``breadcrumbs_ties``,
``della``). Arguments and results are those of `mlx_dora.merge.methods.elementwise`.
"""

from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np

from mlx_dora.errors import DoRAError
from mlx_dora.merge.methods import blockwise
from mlx_dora.merge.methods.blockwise import Tensor, changes, sum_of
from mlx_dora.merge.methods.elementwise import Blocks, Thinning, summed
from mlx_dora.merge.methods.settings import TensorSettings

# Sums of absolute values below this cannot be restored, as in mergekit.
_TINY = 1e-7


def ties(base: Tensor, tensors: Sequence[Tensor], settings: TensorSettings) -> Blocks:
    r"""TIES: trim, elect the sign, average those that agree (arXiv:2306.01708).

    Each task vector keeps its `density` largest entries (the first, among equals). The
    sign of :math:`\sum_i w_i\tau_i` is elected for each element. The weighted mean of
    the entries with that sign, times λ, is added to W0.
    """
    thin = _largest(base, tensors, settings)
    yield from _elected(base, tensors, settings, thin, normalize=True)


def dare(base: Tensor, tensors: Sequence[Tensor], settings: TensorSettings) -> Blocks:
    r"""DARE: drop entries at random and rescale the rest (arXiv:2311.03099).

    .. math:: W_0 + \lambda \sum_i w_i \, (b_i \circ \tau_i) / p_i, \qquad
        b_i \sim \text{Bernoulli}(p_i)

    where p are the densities. The same seed drops the same entries. mergekit's
    definition rescales so that the sum of the absolute values stays.
    """
    thin = _dropped(base, tensors, settings)
    yield from summed(base, tensors, settings, thin=thin)


def dare_ties(
    base: Tensor, tensors: Sequence[Tensor], settings: TensorSettings
) -> Blocks:
    """DARE's dropping and rescaling, then the sign election and mean of TIES."""
    thin = _dropped(base, tensors, settings)
    yield from _elected(base, tensors, settings, thin, normalize=True)


def breadcrumbs(
    base: Tensor, tensors: Sequence[Tensor], settings: TensorSettings
) -> Blocks:
    r"""Model Breadcrumbs: drop the largest and the smallest entries (arXiv:2312.06795).

    Of each task vector, `density` of the entries are kept: those after the `gamma`
    largest ones, in order of size (the first, among equals). If too few are left, less
    than `gamma` is dropped. At density 1 nothing is dropped.
    """
    thin = _middle(base, tensors, settings)
    yield from summed(base, tensors, settings, thin=thin)


def breadcrumbs_ties(
    base: Tensor, tensors: Sequence[Tensor], settings: TensorSettings
) -> Blocks:
    """Dropping by Model Breadcrumbs, then the sign election of TIES."""
    thin = _middle(base, tensors, settings)
    yield from _elected(base, tensors, settings, thin, normalize=False)


def della(base: Tensor, tensors: Sequence[Tensor], settings: TensorSettings) -> Blocks:
    r"""DELLA: MAGPRUNE's dropping, then TIES's election and mean (arXiv:2406.11617).

    MAGPRUNE keeps an entry of a task vector with probability

    .. math:: p_{jk} = p - \epsilon + 2\epsilon\,\frac{r_{jk}}{n - 1}

    where r = 0, ..., n − 1 ranks the entry by size within its row of n, and p is the
    density. What is kept is divided by its probability. mergekit's definition rescales
    so that the sum of the absolute values stays.
    """
    thin, step = _magpruned(base, tensors, settings)
    yield from _elected(base, tensors, settings, thin, normalize=True, step=step)


def della_linear(
    base: Tensor, tensors: Sequence[Tensor], settings: TensorSettings
) -> Blocks:
    """MAGPRUNE's dropping as in `della`, then the weighted sum."""
    thin, step = _magpruned(base, tensors, settings)
    yield from summed(base, tensors, settings, thin=thin, step=step)


def _largest(
    base: Tensor, tensors: Sequence[Tensor], settings: TensorSettings
) -> Thinning:
    """Keep the `density` largest entries of each change."""
    cuts = []
    for tensor, density in zip(tensors, settings.densities(), strict=True):
        if density >= 1 or not base.size:
            cuts.append(_ALL)
        elif density <= 0:
            cuts.append(_NONE)
        else:
            kept = max(1, int(density * base.size))
            cuts.append(_cut(_sizes(base, tensor), kept))

    def thin(index: slice, deltas: Sequence[mx.array]) -> list[mx.array]:
        return [
            mx.where(_is_kept(cut, index, delta), delta, 0.0)
            for cut, delta in zip(cuts, deltas, strict=True)
        ]

    rescales = settings.rescales(False)
    return _restored(base, tensors, thin) if rescales else thin


def _middle(
    base: Tensor, tensors: Sequence[Tensor], settings: TensorSettings
) -> Thinning:
    """Keep `density` of the entries of each change, after the `gamma` largest ones."""
    bounds = []
    densities, gammas = settings.densities(), settings.own["gamma"]
    for tensor, density, gamma in zip(tensors, densities, gammas, strict=True):
        if density >= 1 or not base.size:
            bounds.append((_NONE, _ALL))
            continue
        kept = int(density * base.size)
        last = min(kept + int(gamma * base.size), base.size)
        sizes = _sizes(base, tensor)
        bounds.append((_cut(sizes, last - kept), _cut(sizes, last)))

    def thin(index: slice, deltas: Sequence[mx.array]) -> list[mx.array]:
        thinned = []
        for (outer, inner), delta in zip(bounds, deltas, strict=True):
            is_outlier = _is_kept(outer, index, delta)
            keep = _is_kept(inner, index, delta) & ~is_outlier
            thinned.append(mx.where(keep, delta, 0.0))
        return thinned

    return _restored(base, tensors, thin) if settings.rescales(False) else thin


Cut = tuple[float, int]
"""The least absolute value that is kept, and the index of the last entry that is kept
among those equal to it."""
_ALL: Cut = (0.0, 1 << 62)
_NONE: Cut = (float("inf"), -1)


def _sizes(base: Tensor, tensor: Tensor) -> np.ndarray:
    """Absolute values of a change, float32, held in memory."""
    sizes = np.empty(base.size, np.float32)
    flat = [base.reshape(-1), tensor.reshape(-1)]
    for index in blockwise.slices(base.size):
        sizes[index] = np.array(mx.abs(changes(index, flat)[1][0]), copy=False)
    return sizes


def _cut(sizes: np.ndarray, kept: int) -> Cut:
    """Find the `kept` largest entries; among equals, the first.

    Equal entries are common: float32 weights of similar size differ by multiples of the
    same step.
    """
    if kept <= 0:
        return _NONE
    place = sizes.size - kept
    least = np.partition(sizes, place)[place]
    equal = np.flatnonzero(sizes == least)
    over = int(np.count_nonzero(sizes > least))
    return float(least), int(equal[kept - over - 1])


def _is_kept(cut: Cut, index: slice, delta: mx.array) -> mx.array:
    """Where the entries of a block are within a cut."""
    least, last = cut
    size = mx.abs(delta)
    if last >= index.start + delta.size - 1:
        return size >= least
    if last < index.start:
        return size > least
    place = mx.arange(index.start, index.start + delta.size)
    return (size > least) | (size == least) & (place <= last)


def _dropped(
    base: Tensor, tensors: Sequence[Tensor], settings: TensorSettings
) -> Thinning:
    """Keep each entry with its input's density as probability."""
    shares = settings.densities()
    rescales, by_sum = settings.rescales(True), settings.as_mergekit

    def thin(index: slice, deltas: Sequence[mx.array]) -> list[mx.array]:
        thinned = []
        for i, (delta, share) in enumerate(zip(deltas, shares, strict=True)):
            if share >= 1:
                thinned.append(delta)
                continue
            kept = mx.random.bernoulli(share, delta.shape, key=_key(settings, i, index))
            larger = delta / max(share, 1e-30) if rescales and not by_sum else delta
            thinned.append(mx.where(kept, larger, 0.0))
        return thinned

    return _restored(base, tensors, thin) if rescales and by_sum else thin


def _magpruned(
    base: Tensor, tensors: Sequence[Tensor], settings: TensorSettings
) -> tuple[Thinning, int]:
    """Keep entries at random, larger ones of a row more often; in blocks of rows."""
    width = base.shape[-1] if base.ndim else 1
    spans = settings.own["epsilon"]
    rescales, by_sum = settings.rescales(True), settings.as_mergekit
    shares = settings.densities()
    for share, span in zip(shares, spans, strict=True):
        if 0 < share < 1 and not 0 < share - span <= share + span < 1:
            raise DoRAError(
                f"density {share:g} ± epsilon {span:g} must be between 0 and 1: choose "
                "a smaller epsilon."
            )

    def thin(index: slice, deltas: Sequence[mx.array]) -> list[mx.array]:
        thinned = []
        for i, delta in enumerate(deltas):
            share, span = shares[i], spans[i]
            if not 0 < share < 1 or not delta.size:
                thinned.append(delta if share >= 1 else mx.zeros_like(delta))
                continue
            rows = mx.abs(delta).reshape(-1, width)
            rank = mx.argsort(mx.argsort(rows, axis=1), axis=1).astype(mx.float32)
            place = rank / (width - 1) if width > 1 else mx.full(rows.shape, 0.5)
            chance = ((share - span) + 2 * span * place).reshape(-1)
            kept = mx.random.bernoulli(chance, key=_key(settings, i, index))
            larger = delta / chance if rescales and not by_sum else delta
            thinned.append(mx.where(kept, larger, 0.0))
        return thinned

    step = blockwise.row_step(base)
    if rescales and by_sum:
        return _restored(base, tensors, thin, step), step
    return thin, step


def _key(settings: TensorSettings, i: int, index: slice) -> mx.array:
    """Random key of a block of the i-th input."""
    return mx.random.key((settings.seed + 1_000_003 * i + 7 * index.start) % 2**64)


def _restored(
    base: Tensor, tensors: Sequence[Tensor], thin: Thinning, step: int | None = None
) -> Thinning:
    """Multiply what a thinning keeps so that the sum of absolute values stays."""
    flat = [base.reshape(-1), *(tensor.reshape(-1) for tensor in tensors)]
    before, after = np.zeros(len(tensors)), np.zeros(len(tensors))
    for index in blockwise.slices(base.size, step):
        deltas = changes(index, flat)[1]
        for total, blocks in ((before, deltas), (after, thin(index, deltas))):
            sizes = [np.array(mx.abs(block), copy=False) for block in blocks]
            total += [size.sum(dtype=np.float64) for size in sizes]
    can = (before >= _TINY) & (after >= _TINY)
    factors = np.where(can, before / np.where(can, after, 1.0), 1.0).tolist()

    def restored(index: slice, deltas: Sequence[mx.array]) -> list[mx.array]:
        pairs = zip(thin(index, deltas), factors, strict=True)
        return [block * factor for block, factor in pairs]

    return restored


def _elected(
    base: Tensor,
    tensors: Sequence[Tensor],
    settings: TensorSettings,
    thin: Callable[[slice, Sequence[mx.array]], list[mx.array]],
    *,
    normalize: bool,
    step: int | None = None,
) -> Blocks:
    """The base plus the weighted sum of the changes that have the elected sign.

    `normalize`, the default of the setting, divides by the weights of those changes.
    """
    weights, normalize = settings.plain_weights(), settings.normalizes(normalize)

    def block(index: slice, flat: Sequence[Tensor]) -> mx.array:
        start, deltas = changes(index, flat)
        moved = [w * d for w, d in zip(weights, thin(index, deltas), strict=True)]
        agrees = with_elected_sign(moved)
        pairs = zip(agrees, moved, strict=True)
        total = sum_of([mx.where(agree, change, 0.0) for agree, change in pairs])
        if normalize:
            pairs = zip(agrees, weights, strict=True)
            share = sum_of([mx.where(agree, weight, 0.0) for agree, weight in pairs])
            total = total / mx.where(share == 0, 1.0, share)
        return start + settings.scale * total

    return blockwise.parts(block, [base, *tensors], step)


def with_elected_sign(changes: Sequence[mx.array]) -> list[mx.array]:
    """Where each change has the sign of the sum of all."""
    elected = mx.where(sum_of(changes) >= 0, 1.0, -1.0)
    return [mx.sign(change) == elected for change in changes]
