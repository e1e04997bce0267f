"""Comparisons that several tests share."""

import mlx.core as mx
import numpy as np

from mlx_dora.kernels.dispatch import device_backend, multiplies_in_tf32

# Relative RMS error allowed for a result computed in a dtype.
BOUNDS = {mx.float32: 1e-5, mx.float16: 1e-3, mx.bfloat16: 8e-3}

IS_TF32 = multiplies_in_tf32(device_backend())
"""Whether this device rounds the factors of float32 products to TF32."""

TF32_BOUND = 2e-3
"""Least bound there: a factor is off by up to 2⁻¹¹, and gradients chain products."""


def to_numpy(value: mx.array | np.ndarray) -> np.ndarray:
    """The values in float64, whatever the dtype they are stored in."""
    if isinstance(value, mx.array):
        value = np.array(value.astype(mx.float32))
    return np.asarray(value, dtype=np.float64)


def relative_rms(actual: mx.array | np.ndarray, expected: np.ndarray) -> float:
    """Root mean square of the error over that of the expected values."""
    truth = to_numpy(expected)
    assert np.isfinite(truth).all(), "the expected values are not finite"
    error = to_numpy(actual)
    assert error.shape == truth.shape, f"shape {error.shape}, expected {truth.shape}"
    scale = np.sqrt(np.mean(truth**2))
    return float(np.sqrt(np.mean((error - truth) ** 2)) / (scale or 1.0))


def assert_close(
    actual: mx.array | np.ndarray,
    expected: np.ndarray,
    dtype: mx.Dtype = mx.float32,
    bound: float | None = None,
    *,
    tf32: float = TF32_BOUND,
) -> None:
    """Fail unless the relative RMS error is within the dtype's bound (NaN fails).

    Where float32 is multiplied in TF32, no bound is tighter than `tf32`.
    """
    limit = BOUNDS[dtype] if bound is None else bound
    limit = max(limit, tf32) if IS_TF32 else limit
    error = relative_rms(actual, expected)
    assert error <= limit, f"relative RMS error {error:.3g}, allowed {limit:.3g}"
