"""Fisher merging of one tensor of several models, by row or by element."""

from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx
import numpy as np

from mlx_dora.errors import DoRAError
from mlx_dora.merge.fisher.information import informed_weights
from mlx_dora.merge.methods import elementwise
from mlx_dora.merge.methods.settings import TensorSettings
from mlx_dora.merge.models.tensor import mean_shares, merge_tensor


def merge_informed_tensor(
    tensors: Sequence[mx.array],
    settings: TensorSettings,
    informations: Sequence[mx.array | None],
) -> tuple[mx.array, int]:
    """Merge one tensor of N models by their Fisher information.

    Args:
        tensors: N arrays of the same shape.
        settings: Settings with the weights of the models.
        informations: Fisher information of each model, all ``(out,)`` or all of the
            tensor's shape; if any is None, the result is the weighted mean.

    Returns:
        The merged tensor, float32, and the number of elements without information.

    Raises:
        DoRAError: If weights are negative or all 0, or by row and the information by
            element.
    """
    known = [information for information in informations if information is not None]
    size = tensors[0].size
    if len(known) < len(informations):
        return merge_tensor("linear", None, tensors, settings)[0], size
    rows = tensors[0].shape[0]
    shares = mean_shares(settings.weights, rows)
    if known[0].ndim == 1:
        informed, unknown = informed_weights(shares, known)
        by_row = replace(settings, weights=informed)
        merged, _ = merge_tensor("linear", None, tensors, by_row)
        return merged, unknown * (size // rows)
    if np.ptp(shares, axis=0).any():
        raise DoRAError(
            "Fisher information by element needs one weight per model, not one per row."
        )
    weights = [float(share) for share in shares[0]]
    return elementwise.fisher(tensors, known, weights)
