"""Which DoRA layer a module takes, by its exact class."""

import mlx.nn as nn

from mlx_dora.layers._layer import unsupported
from mlx_dora.layers.embedding import DoRAEmbedding
from mlx_dora.layers.linear import DoRALinear

_LAYERS = {
    cls: layer for layer in (DoRALinear, DoRAEmbedding) for cls in layer.base_types
}


def dora_class(module: nn.Module) -> type[DoRALinear] | type[DoRAEmbedding]:
    """The layer that adapts `module`.

    Raises:
        DoRAError: If `module` is of any other class, subclasses included.
    """
    layer = _LAYERS.get(type(module))
    if layer is None:
        raise unsupported(module, tuple(_LAYERS))
    return layer
