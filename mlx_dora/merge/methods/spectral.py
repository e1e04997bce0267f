r"""Methods on the singular values of a whole matrix.

They give the same result in every orthonormal basis, so adapters are merged in core
space. Arguments and results are those of `mlx_dora.merge.methods.elementwise`.
"""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mlx_dora.merge.methods import blockwise
from mlx_dora.merge.methods.blockwise import Tensor
from mlx_dora.merge.methods.elementwise import Blocks, summed
from mlx_dora.merge.methods.settings import TensorSettings

# Singular values below this share of the largest are rounding errors of float32.
_NOISE = 1e-5


def iso(base: Tensor, tensors: Sequence[Tensor], settings: TensorSettings) -> Blocks:
    r"""Iso-C: give the sum of the changes a flat spectrum (arXiv:2502.04959).

    .. math:: W_0 + \lambda\,\bar\sigma\,U V^\top, \qquad
        \sum_i w_i\tau_i = U \Sigma V^\top, \quad \bar\sigma = \tfrac1k \sum_j \sigma_j

    over the k singular values above rounding errors: all of them for fine-tuned models,
    and the span of the updates for adapters, whose other directions are arbitrary.
    Each matrix of a stack is merged on its own; vectors get the weighted mean of the
    changes, times λ. The whole tensor is held in memory.
    """
    if base.ndim < 2:
        yield from summed(base, tensors, settings, normalize=True)
        return
    start, *others = (
        np.array(blockwise.held(tensor).astype(mx.float32), np.float64)
        for tensor in (base, *tensors)
    )
    weights = settings.plain_weights()
    total = sum(w * (other - start) for w, other in zip(weights, others, strict=True))
    u, sizes, v = np.linalg.svd(total, full_matrices=False)
    kept = sizes > _NOISE * sizes.max(axis=-1, keepdims=True, initial=0.0)
    count = np.maximum(kept.sum(-1, keepdims=True), 1)
    flat = np.where(kept, np.where(kept, sizes, 0.0).sum(-1, keepdims=True) / count, 0)
    merged = start + settings.scale * (u * flat[..., None, :]) @ v
    yield mx.array(merged.astype(np.float32)).reshape(-1)
