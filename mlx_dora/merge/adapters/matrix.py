"""Merges the adapters of one matrix by any method."""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mlx_dora.errors import DoRAError
from mlx_dora.io.finite import all_finite
from mlx_dora.matrix import Adapted, Weight
from mlx_dora.matrix.weight import dense
from mlx_dora.merge.adapters.dense import Options, factor, merge_apart, row_norm
from mlx_dora.merge.adapters.factored import NOT_FINITE, MergedMatrix, merge_matrix
from mlx_dora.merge.adapters.informed import merge_informed
from mlx_dora.merge.methods import method_named


def merge_one(
    weight: Weight,
    inputs: Sequence[Adapted],
    shares: np.ndarray,
    method: str,
    rank: int | None,
    target: float,
    options: Options,
    known: Sequence[mx.array | None],
) -> MergedMatrix:
    """Merge the adapters of one matrix by any method.

    Args:
        weight: Base weight. Shape ``(out, in)``.
        inputs: The N adapters.
        shares: Weights, shape ``(out, N)``; for means each row sums to 1.
        method: Name of the method.
        rank: Maximum rank of the update; None for the sum of the inputs' ranks.
        target: Multiplier of the merged adapter.
        options: Settings of the method.
        known: Fisher information of each input, for a method that needs it.

    Raises:
        DoRAError: If weights differ by row and the method does not support that, or an
            adapted row is not finite.
    """
    entry = method_named(method)
    if entry.is_mean:
        counts = np.flatnonzero(shares.any(0)).tolist()
        inputs, shares = [inputs[i] for i in counts], shares[:, counts]
        known = [known[i] for i in counts] if known else known
        if len(inputs) == 1 and rank is None and inputs[0].m is not None:
            return _unchanged(inputs[0], inputs[0].m, target)
    if entry.needs_fisher:
        return merge_informed(weight, inputs, shares, known, scale=target, rank=rank)
    if entry.is_exact:
        shares = options.scale * shares
        return merge_matrix(
            weight, inputs, shares, method=method, scale=target, rank=rank
        )
    return _merge_densely(weight, inputs, shares, method, rank, target, options)


def _unchanged(only: Adapted, m: mx.array, target: float) -> MergedMatrix:
    """A single input, unchanged except for the scale."""
    update = only.update
    up = update.lora_b * (update.scale / target)
    return MergedMatrix(
        lora_a=update.lora_a,
        lora_b=update.lora_b if update.scale == target else up,
        m=m,
        scale=target,
    )


def _merge_densely(
    weight: Weight,
    inputs: Sequence[Adapted],
    shares: np.ndarray,
    method: str,
    rank: int | None,
    target: float,
    options: Options,
) -> MergedMatrix:
    if np.ptp(shares, axis=0).any():
        raise DoRAError(f"{method} needs one weight per adapter, not one per row.")
    base = dense(weight).astype(mx.float32)
    directions, magnitudes = [], []
    for adapted in inputs:
        update = adapted.update
        directions.append(base + update.rows(slice(None)))
        if not all_finite(directions[-1]):
            raise DoRAError(NOT_FINITE)
        magnitudes.append(row_norm(directions[-1]) if adapted.m is None else adapted.m)
    direction, magnitude = merge_apart(
        method, base, directions, magnitudes, [float(v) for v in shares[0]], options
    )
    total = sum(adapted.update.lora_a.shape[1] for adapted in inputs)
    return factor(
        base, direction, magnitude, scale=target, rank=rank or total, rescale=False
    )
