"""Pico: shrinks what the B's of several adapters share (arXiv:2604.16826)."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mlx_dora.matrix import Factors


def pico(updates: Sequence[Factors]) -> list[Factors]:
    r"""Calibrate the B's of T updates (arXiv:2604.16826, section 4.1).

    .. math:: [s_1B_1, \dots, s_TB_T] = U \Sigma V^\top, \quad
        \alpha_j = \Bigl(1 + (T - 1) \frac{\sigma_j^2}{\sum_k \sigma_k^2}\Bigr)^{-1},
        \quad \tilde B_t = B_t + U \operatorname{diag}(\alpha - 1) U^\top B_t

    A direction that carries the whole energy shrinks to 1/T, one that carries little
    stays. A single update is unchanged. Merge the result with any method, then restore
    the size (`mlx_dora.merge.adapters.calibrate.restored`).
    """
    stacked = np.concatenate([update.b for update in updates], axis=1)
    left, sizes, _ = np.linalg.svd(stacked, full_matrices=False)
    energy = np.square(sizes) / max(float(np.square(sizes).sum()), 1e-300)
    shrink = 1 / (1 + (len(updates) - 1) * energy) - 1
    return [
        replace(each, b=each.b + left @ (shrink[:, None] * (left.T @ each.b)))
        for each in updates
    ]
