"""Which DoRA layer a module takes, by its exact class."""

import mlx.nn as nn

from mlx_dora.layers._layer import DoRALayer, unsupported
from mlx_dora.layers.embedding import DoRAEmbedding
from mlx_dora.layers.linear import DoRALinear

_LAYERS = {
    cls: layer for layer in (DoRALinear, DoRAEmbedding) for cls in layer.base_types
}


# Where mlx-lm's experts are; a model that has them has imported it.
_SWITCH = "mlx_lm.models.switch_layers"


def dora_class(module: nn.Module) -> type[DoRALayer]:
    """The layer that adapts `module`.

    Raises:
        DoRAError: If `module` is of any other class, subclasses included.
    """
    known: dict[type[nn.Module], type[DoRALayer]] = dict(_LAYERS)
    if type(module).__module__ == _SWITCH:
        from mlx_dora.layers.switch import DoRASwitchLinear

        known |= dict.fromkeys(DoRASwitchLinear.base_types, DoRASwitchLinear)
    layer = known.get(type(module))
    if layer is None:
        raise unsupported(module, tuple(known))
    return layer
