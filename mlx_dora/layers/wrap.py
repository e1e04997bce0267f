"""Which DoRA layer a module takes, by its exact class."""

import mlx.nn as nn

from mlx_dora.errors import DoRAError
from mlx_dora.layers.embedding import DoRAEmbedding
from mlx_dora.layers.linear import DoRALinear

# Exact classes: a subclass whose call does something else would be adapted wrongly.
_LAYERS: dict[type, type] = {
    nn.Linear: DoRALinear,
    nn.QuantizedLinear: DoRALinear,
    nn.Embedding: DoRAEmbedding,
    nn.QuantizedEmbedding: DoRAEmbedding,
}


def dora_class(module: nn.Module) -> type[DoRALinear] | type[DoRAEmbedding]:
    """The layer that adapts `module`.

    Raises:
        DoRAError: If `module` is of any other class, subclasses included.
    """
    layer = _LAYERS.get(type(module))
    if layer is None:
        known = ", ".join(cls.__name__ for cls in _LAYERS)
        raise DoRAError(
            f"{type(module).__module__}.{type(module).__name__} cannot take DoRA; "
            f"supported are exactly {known} (subclasses may compute something else)."
        )
    return layer
