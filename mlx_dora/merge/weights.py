"""How much each input counts: one number each, by pattern, or row by row."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import mlx.core as mx
import numpy as np

from mlx_dora.errors import DoRAError

Weight = float | int | mx.array | np.ndarray | Sequence[float]
"""A number, or one number a row: ``(out,)``."""
Weights = Sequence[Weight] | Mapping[str, Sequence[Weight]]
"""One weight an input; or patterns (``*.self_attn.*``) to such lists."""


def check_weights(weights: Weights | None, count: int) -> None:
    """Refuse weights that cannot be right for `count` inputs, whatever the module.

    Raises:
        DoRAError: With the pattern, what was expected and what came.
    """
    if weights is None:
        return
    is_mapping = isinstance(weights, Mapping)
    lists = dict(weights) if is_mapping else {"weights": weights}
    if not lists:
        raise DoRAError("weights must name a pattern or be left out, got {}.")
    for pattern, values in lists.items():
        if isinstance(values, str | float | int) or len(values) != count:
            raise DoRAError(
                f"weights{f' of {pattern!r}' if is_mapping else ''}: expected {count}, "
                f"one for each input, got {values}."
            )
        for value in values:
            array = _array(value)
            if array.ndim > 1 or not np.isfinite(array).all():
                raise DoRAError(f"weights: {value} is not a number, nor one a row.")


def row_weights(
    weights: Weights | None, name: str, count: int, rows: int, *, normalize: bool
) -> np.ndarray:
    """The weights of one module, row by row.

    Args:
        weights: As given; None weighs all inputs alike, with 1.
        name: The module's path; of several patterns that fit, the first counts.
        count: Number of inputs.
        rows: Number of output rows.
        normalize: Make each row sum to 1.

    Returns:
        Shape ``(rows, count)``, float64.

    Raises:
        DoRAError: If no pattern fits, an array has not one entry a row, or weights
            that must be normalised are negative or sum to 0.
    """
    values = _for_name(weights, name, count)
    shares = np.empty((rows, count))
    for i, value in enumerate(values):
        array = _array(value)
        if array.ndim == 1 and array.size != rows:
            raise DoRAError(
                f"weights of {name}: expected a number or {rows}, one a row, got "
                f"{array.size}."
            )
        shares[:, i] = array
    if not normalize:
        return shares
    total = shares.sum(1, keepdims=True)
    if (shares < 0).any() or not (total > 0).all():
        raise DoRAError(
            f"weights of {name}: a mean needs weights of at least 0 with a positive "
            f"sum, got {[float(v) for v in shares[0]]}."
        )
    return shares / total


def _for_name(weights: Weights | None, name: str, count: int) -> Sequence[Weight]:
    if weights is None:
        return [1.0] * count
    if not isinstance(weights, Mapping):
        return weights
    for pattern, values in weights.items():
        if pattern == name or fnmatchcase(name, pattern):
            return values
    raise DoRAError(
        f"weights: no pattern fits {name}; add '*' as the last for all others."
    )


def _array(value: Weight) -> np.ndarray:
    if isinstance(value, mx.array):
        value = np.array(value.astype(mx.float32))
    try:
        return np.asarray(value, np.float64)
    except (TypeError, ValueError) as error:
        raise DoRAError(f"weights: {value!r} is not a number.") from error
