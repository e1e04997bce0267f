r"""Merges the adapters of one matrix in a space, without a dense weight.

.. math:: V = W_0 + L \, M(C_1, \dots, C_N) \, R^\top

where M is a block method on coordinates (`mlx_dora.merge.methods.coordinates`), with 0
in place of the base: W0 is common to all inputs, so their changes are the updates.
Magnitudes are merged on their own (`mlx_dora.merge.methods.lengths`).
"""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mlx_dora.errors import DoRAError
from mlx_dora.io.finite import all_finite
from mlx_dora.matrix import Adapted, LowRank, Weight, row_grams
from mlx_dora.merge.adapters.dense import Options, plain_weights, tensor_settings
from mlx_dora.merge.adapters.factored import (
    NOT_FINITE,
    MergedMatrix,
    cut,
    gains,
    single,
)
from mlx_dora.merge.methods import METHODS, MergeMethod
from mlx_dora.merge.methods.blockwise import joined
from mlx_dora.merge.methods.coordinates import Coordinates
from mlx_dora.merge.methods.lengths import (
    Lengths,
    merged_magnitude,
    signed_lengths,
)
from mlx_dora.merge.methods.settings import TensorSettings
from mlx_dora.merge.methods.spaces import Space


def merge_in_space(
    weight: Weight,
    inputs: Sequence[Adapted],
    shares: np.ndarray,
    *,
    method: str,
    space: Space,
    scale: float,
    rank: int | None = None,
    options: Options,
) -> MergedMatrix:
    """Merge the adapters of one matrix by a block method, in a space.

    Arguments are those of `mlx_dora.merge.adapters.factored.merge_matrix`, the space,
    and the method's settings. The base weight is read once.

    Returns:
        The merged adapter, of rank Σ r_i or less, or cut to `rank`.

    Raises:
        DoRAError: If weights differ by row, the space needs a rank, or an adapted row
            is not finite.
    """
    space.check_rank(rank)
    weights = plain_weights(method, shares)
    for adapted in inputs:
        if not all_finite(adapted.update.lora_a) & all_finite(adapted.update.lora_b):
            raise DoRAError(NOT_FINITE)
    entry = METHODS[method]
    settings = tensor_settings(entry, weights, options)
    coordinates = space.function([each.update.float64() for each in inputs], rank)
    merged = coordinates.lifted(merged_parts(entry, coordinates, settings))
    update = LowRank(lora_a=single(merged.a), lora_b=single(merged.b.T), scale=1.0)
    grams = row_grams(weight, [*(each.update for each in inputs), update])
    if not (grams.norm <= np.finfo(np.float32).max).all():
        raise DoRAError(NOT_FINITE)
    norm, own = grams.norm[:, :-1], grams.norm[:, -1]
    lengths = Lengths(
        base=grams.base_norm,
        inputs=signed_lengths(norm, [each.m for each in inputs]),
        weights=shares,
        own=own,
    )
    m = merged_magnitude(entry, lengths, settings, options.magnitudes)
    merged, discarded = cut(merged, rank, gains(m, own))
    return MergedMatrix(
        lora_a=single(merged.a),
        lora_b=single((merged.b / scale).T),
        m=single(m),
        scale=scale,
        recomputed=grams.recomputed,
        zero=int((m == 0).sum()),
        discarded=discarded,
    )


def merged_parts(
    entry: MergeMethod, coordinates: Coordinates, settings: TensorSettings
) -> np.ndarray:
    """Apply a block method to coordinates, with 0 as the base. Shape ``(k, l)``.

    Raises:
        DoRAError: If a coordinate is beyond float32.
    """
    shape = coordinates.parts[0].shape
    base = mx.zeros(shape, mx.float32)
    tensors = [single(part) for part in coordinates.parts]
    if not all(map(all_finite, tensors)):
        raise DoRAError(NOT_FINITE)
    merged = joined(entry.block_function(base, tensors, settings), shape)
    return np.array(merged, np.float64)
