"""Fuses full fine-tuning: replaces parameters of the base by trained ones."""

from collections.abc import Mapping
from typing import cast

import mlx.core as mx

from mlx_dora.fuse.report import FusedLayer, Survival

# Elements of a block, as in `mlx_dora.fuse.layer`.
_BLOCK = 1 << 16


def replace_parts(
    path: str, parts: dict[str, mx.array], trained: Mapping[str, mx.array]
) -> list[FusedLayer]:
    """Replace a module's arrays by trained values, in the dtype of the arrays.

    Args:
        path: Full path of the module.
        parts: Arrays of the module by name; changed in place.
        trained: Map from full parameter names to trained values.

    Returns:
        A report on each replaced parameter.
    """
    layers = []
    for leaf, before in parts.items():
        name = f"{path}.{leaf}" if path else leaf
        if name not in trained:
            continue
        after = trained[name].astype(before.dtype)
        layers.append(
            FusedLayer(
                path=name,
                dtype=str(before.dtype).rpartition(".")[2],
                bits=None,
                bytes_before=before.nbytes,
                bytes_after=after.nbytes,
                survival=_rounding(before, trained[name], after),
            )
        )
        parts[leaf] = after
    return layers


def _rounding(before: mx.array, exact: mx.array, after: mx.array) -> Survival:
    """Measure how much of `exact` - `before` survives rounding to the base's dtype."""
    survival = Survival()
    if not mx.issubdtype(before.dtype, mx.floating):
        return survival  # packed values are not rounded
    flat = [values.reshape(-1) for values in (before, exact, after)]
    for start in range(0, before.size, _BLOCK):
        base, wanted, left = (
            values[start : start + _BLOCK].astype(mx.float32) for values in flat
        )
        due, done = wanted - base, left - base
        sums = [(due * due).sum(), (due * done).sum(), (done * done).sum()]
        exact_square, product, kept_square = cast(list[float], mx.stack(sums).tolist())
        survival += Survival(
            exact_square=exact_square, product=product, kept_square=kept_square
        )
    return survival
