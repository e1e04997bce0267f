"""Selects the gathered layer for a module, by the DoRA layer that adapts it."""

import mlx.nn as nn

from mlx_dora.layers._layer import DoRALayer
from mlx_dora.layers.embedding import DoRAEmbedding
from mlx_dora.layers.gathered.embedding import GatheredEmbedding
from mlx_dora.layers.gathered.layer import GatheredLayer
from mlx_dora.layers.gathered.linear import GatheredLinear
from mlx_dora.layers.gathered.multi import GatheredMultiLinear
from mlx_dora.layers.gathered.rows import BatchRows
from mlx_dora.layers.gathered.switch import GatheredSwitchLinear
from mlx_dora.layers.linear import DoRALinear
from mlx_dora.layers.multi import DoRAMultiLinear
from mlx_dora.layers.switch import DoRASwitchLinear
from mlx_dora.layers.wrap import dora_class

_GATHERED: dict[type[DoRALayer], type[GatheredLayer]] = {
    DoRAEmbedding: GatheredEmbedding,
    DoRALinear: GatheredLinear,
    DoRAMultiLinear: GatheredMultiLinear,
    DoRASwitchLinear: GatheredSwitchLinear,
}


def gathered_layer(base: nn.Module, rows: BatchRows, path: str) -> GatheredLayer:
    """Return a layer over `base` that takes an adapter for each row.

    Args:
        base: A module that a DoRA layer can adapt; it is kept unchanged.
        rows: The adapter of each row of the batch.
        path: Path of the module in the model.

    Raises:
        DoRAError: If no DoRA layer adapts modules of this class.
    """
    return _GATHERED[dora_class(base)](base, rows, path)
