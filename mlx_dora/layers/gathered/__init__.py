"""Layers that take another adapter for each row of a batch, for serving."""

from mlx_dora.layers.gathered.layer import GatheredLayer
from mlx_dora.layers.gathered.rows import BASE, BatchRows
from mlx_dora.layers.gathered.switch import GatheredSwitchLinear, watch_sorting
from mlx_dora.layers.gathered.wrap import gathered_layer

__all__ = [
    "BASE",
    "BatchRows",
    "GatheredLayer",
    "GatheredSwitchLinear",
    "gathered_layer",
    "watch_sorting",
]
