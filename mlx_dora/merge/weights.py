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


def check_weights(weights: Weights | None, count: int) -> dict[str, list[np.ndarray]]:
    """Check and convert the weights of `count` inputs.

    Returns:
        A number or an array by row for each input, by module pattern; one pattern,
        ``*``, if the weights are the same for all modules.

    Raises:
        DoRAError: With the pattern, the expected number and the given weights.
    """
    if weights is None:
        return {"*": [np.array(1.0)] * count}
    is_mapping = isinstance(weights, Mapping)
    lists = dict(weights) if is_mapping else {"*": weights}
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
    return {
        pattern: [_array(value) for value in values]
        for pattern, values in lists.items()
    }


def _array(value: Weight) -> np.ndarray:
    is_mlx = isinstance(value, mx.array)
    try:
        array = np.array(value.astype(mx.float32) if is_mlx else value, np.float64)
    except (TypeError, ValueError) as error:
        raise DoRAError(f"weights: {value!r} is not a number.") from error
    if array.ndim > 1 or not np.isfinite(array).all():
        raise DoRAError(
            f"weights: expected a finite number, or one per row, got {value}."
        )
    return array


def row_weights(
    weights: Mapping[str, Sequence[np.ndarray]],
    rows: Mapping[str, int],
    *,
    normalize: bool,
) -> dict[str, np.ndarray]:
    """The weights of modules, row by row, from the first pattern that matches a path.

    `rows` is the number of output rows of each module, by path. `normalize` divides so
    that each row sums to 1.

    Returns:
        By path, shape ``(rows, count)``, float64.

    Raises:
        DoRAError: If no pattern matches, an array does not have one entry per row, or
            weights to normalize are negative or sum to 0.
    """
    made: dict[tuple[str, int], np.ndarray] = {}  # many modules have equal weights
    shares = {}
    for name, size in rows.items():
        for pattern in weights:
            if pattern == name or fnmatchcase(name, pattern):
                break
        else:
            raise DoRAError(
                f"weights: no pattern matches {name}; add '*' as the last pattern to "
                "match all other modules."
            )
        if (pattern, size) not in made:
            where = f"weights of {name}: "
            share = _by_row(weights[pattern], size, where)
            made[pattern, size] = normalized(share, where) if normalize else share
        shares[name] = made[pattern, size]
    return shares


def _by_row(values: Sequence[np.ndarray], size: int, where: str) -> np.ndarray:
    share = np.empty((size, len(values)))
    for i, value in enumerate(values):
        if value.ndim == 1 and value.size != size:
            raise DoRAError(
                f"{where}expected a number or {size}, one per row, got {value.size}."
            )
        share[:, i] = value
    return share


def normalized(weights: np.ndarray, where: str = "") -> np.ndarray:
    """Weights ``(rows, N)`` divided so that each row sums to 1.

    Raises:
        DoRAError: If a weight is negative or all of a row are 0; begins with `where`.
    """
    total = weights.sum(1, keepdims=True)
    if (weights < 0).any() or not (total > 0).all():
        raise DoRAError(
            f"{where}a mean needs weights of at least 0 with a positive sum, got "
            f"{[float(weight) for weight in weights[0]]}."
        )
    return weights / total
