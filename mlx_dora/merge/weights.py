"""Weights of the inputs of a merge: numbers, by module pattern, or by row."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import mlx.core as mx
import numpy as np

from mlx_dora.errors import DoRAError

Weight = float | int | mx.array | np.ndarray | Sequence[float]
"""A number, or one number per row: shape ``(out,)``."""
Weights = Sequence[Weight] | Mapping[str, Sequence[Weight]]
"""One weight per input, or such lists by module pattern (``*.self_attn.*``)."""


def check_weights(weights: Weights | None, count: int) -> None:
    """Refuse weights that are invalid for `count` inputs in every module.

    Raises:
        DoRAError: With the pattern, the expected number and the given weights.
    """
    if weights is None:
        return
    is_mapping = isinstance(weights, Mapping)
    lists = dict(weights) if is_mapping else {"weights": weights}
    if not lists:
        raise DoRAError(
            "weights: expected at least one pattern, got {}; leave them out for equal "
            "weights."
        )
    for pattern, values in lists.items():
        if isinstance(values, str | float | int) or len(values) != count:
            raise DoRAError(
                f"weights{f' of {pattern!r}' if is_mapping else ''}: expected {count}, "
                f"one for each input, got {values}."
            )
        for value in values:
            array = _array(value)
            if array.ndim > 1 or not np.isfinite(array).all():
                raise DoRAError(
                    f"weights: expected a finite number, or one per row, got {value}."
                )


def row_weights(
    weights: Weights | None, name: str, count: int, rows: int, *, normalize: bool
) -> np.ndarray:
    """The weights of one module, row by row.

    Args:
        weights: As the user gave them; None gives every input weight 1.
        name: The module's path; the first pattern that matches it is used.
        count: Number of inputs.
        rows: Number of output rows.
        normalize: Divide so that each row sums to 1.

    Returns:
        Shape ``(rows, count)``, float64.

    Raises:
        DoRAError: If no pattern matches, an array does not have one entry per row, or
            weights to normalize are negative or sum to 0.
    """
    values = _for_name(weights, name, count)
    shares = np.empty((rows, count))
    for i, value in enumerate(values):
        array = _array(value)
        if array.ndim == 1 and array.size != rows:
            raise DoRAError(
                f"weights of {name}: expected a number or {rows}, one per row, got "
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
        f"weights: no pattern matches {name}; add '*' as the last pattern to match all "
        "other modules."
    )


def _array(value: Weight) -> np.ndarray:
    if isinstance(value, mx.array):
        value = np.array(value.astype(mx.float32))
    try:
        return np.asarray(value, np.float64)
    except (TypeError, ValueError) as error:
        raise DoRAError(f"weights: {value!r} is not a number.") from error
