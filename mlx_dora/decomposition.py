"""Decomposition of a weight into magnitude and direction, and its inverse."""

import mlx.core as mx
import numpy as np

from mlx_dora.errors import DoRAError
from mlx_dora.kernels import normalize_rows
from mlx_dora.matrix.weight import row_norms

Array = mx.array | np.ndarray
"""Arrays that these functions accept; they return `mx.array`."""


def dora_decompose(W: Array, eps: float = 0.0) -> tuple[mx.array, mx.array]:
    r"""Split a weight into the length and direction of each output row.

    .. math:: m_j = \lVert W_j \rVert_2, \qquad \hat V_j = W_j / (m_j + \epsilon)

    Eq. 2 of DoRA (arXiv:2402.09353). The paper's column norm is the norm of each output
    row here, because MLX stores weights as (out, in).

    Args:
        W: Weight. Shape ``(out, in)``, any float dtype; NumPy's float64 is rounded to
            float32.
        eps: Added to the divisor; 0 keeps directions of unit length.

    Returns:
        m, shape ``(out,)``, float32, and the direction, shape ``(out, in)``, in the
        dtype of `W`. A zero row has magnitude 0 and direction 0.

    Raises:
        DoRAError: If `W` is not a float matrix, or `eps` is negative.
        TypeError: If `W` is not an array.
    """
    W = _float_matrix("W", W)
    if not eps >= 0:
        raise DoRAError(f"eps must be at least 0, got {eps}.")
    direction, m = normalize_rows(W)
    if eps:
        length = mx.where(m > 0, m / (m + eps), 0.0)
        direction, _ = normalize_rows(W, length)
    return m, direction


def dora_merge(W0: Array, delta_m: Array, delta_V: Array) -> mx.array:
    r"""Recombine a weight with a change of magnitude and a change of direction.

    .. math:: W' = (\lVert W_0 \rVert + \Delta m) \circ
        (W_0 + \Delta V) / \lVert W_0 + \Delta V \rVert

    Eq. 5 of DoRA (arXiv:2402.09353), with one norm per output row.

    Args:
        W0: Base weight. Shape ``(out, in)``, any float dtype.
        delta_m: Change of magnitude. Shape ``(out,)``.
        delta_V: Change of the unnormalized direction. Shape ``(out, in)``.

    Returns:
        W', ``(out, in)`` in the dtype of `W0`, rounded once. A row of W0 + ΔV that
        is zero stays zero.

    Raises:
        DoRAError: If `W0` is not a float matrix or the shapes do not fit together.
        TypeError: If an argument is not an array.
    """
    W0 = _float_matrix("W0", W0)
    delta_m, delta_V = as_array("delta_m", delta_m), as_array("delta_V", delta_V)
    if delta_V.shape != W0.shape or delta_m.shape != W0.shape[:1]:
        raise DoRAError(
            f"delta_m {delta_m.shape} and delta_V {delta_V.shape} do not fit a weight "
            f"of shape {W0.shape}; expected {W0.shape[:1]} and {W0.shape}."
        )
    full = W0.astype(mx.float32)
    m = row_norms(full) + delta_m.astype(mx.float32)
    merged, _ = normalize_rows(full + delta_V.astype(mx.float32), m)
    return merged.astype(W0.dtype)


def as_array(name: str, values: object) -> mx.array:
    """Convert an MLX or NumPy array to MLX; float64 is rounded to float32.

    Raises:
        DoRAError: If MLX has no dtype for a NumPy array.
        TypeError: If `values` is not an array.
    """
    if isinstance(values, mx.array):
        return values
    if not isinstance(values, np.ndarray):
        raise TypeError(
            f"{name} must be an mx.array or a NumPy array, got {type(values).__name__}."
        )
    if values.dtype.kind not in "fiub" or values.dtype.itemsize > 8:
        raise DoRAError(f"{name}: MLX has no dtype for NumPy's {values.dtype}.")
    if values.dtype == np.float64:
        with np.errstate(over="ignore"):
            values = values.astype(np.float32)
    return mx.array(values)


def _float_matrix(name: str, values: Array) -> mx.array:
    weight = as_array(name, values)
    if weight.ndim != 2 or not mx.issubdtype(weight.dtype, mx.floating):
        raise DoRAError(
            f"{name} must be a float matrix (out, in), got shape {weight.shape} of "
            f"{weight.dtype}; dequantize a packed weight first."
        )
    return weight
