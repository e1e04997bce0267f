"""Full fine-tuning fused: trained parameters in the place of the base's."""

from collections.abc import Mapping
from typing import cast

import mlx.core as mx

from mlx_dora.adapters.fuse_report import FusedLayer, Survival

# Elements of a block, as in `mlx_dora.adapters.fuse_layer`.
_BLOCK = 1 << 16


def replace_parts(
    path: str, parts: dict[str, mx.array], trained: Mapping[str, mx.array]
) -> list[FusedLayer]:
    """Put trained values in the place of a module's own arrays, in their dtype.

    Args:
        path: The module's full path.
        parts: Its arrays by their names in it; changed in place.
        trained: Parameter names to trained values.

    Returns:
        What became of each replaced parameter.
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
    """How much of `exact` - `before` is left after rounding to the base's dtype."""
    survival = Survival()
    if not mx.issubdtype(before.dtype, mx.floating):
        return survival  # packed values, taken over as they are
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
