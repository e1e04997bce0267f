"""Which DoRA layer a module takes, by its exact class."""

from importlib import import_module

import mlx.nn as nn

from mlx_dora.layers._layer import DoRALayer, unsupported
from mlx_dora.layers.embedding import DoRAEmbedding
from mlx_dora.layers.linear import DoRALinear

_LAYERS = {
    cls: layer for layer in (DoRALinear, DoRAEmbedding) for cls in layer.base_types
}


# Where mlx-lm's experts and heads are, and who adapts them: importing it is slow, and a
# model that has them has done so.
_STACKS = {
    "mlx_lm.models.switch_layers": ("mlx_dora.layers.switch", "DoRASwitchLinear"),
    "mlx_lm.models.mla": ("mlx_dora.layers.multi", "DoRAMultiLinear"),
}


def dora_class(module: nn.Module) -> type[DoRALayer]:
    """The layer that adapts `module`.

    Raises:
        DoRAError: If `module` is of any other class, subclasses included.
    """
    known: dict[type[nn.Module], type[DoRALayer]] = dict(_LAYERS)
    if (home := type(module).__module__) in _STACKS:
        name, stack = _STACKS[home]
        found: type[DoRALayer] = getattr(import_module(name), stack)
        known |= dict.fromkeys(found.base_types, found)
    layer = known.get(type(module))
    if layer is None:
        raise unsupported(module, tuple(known))
    return layer
