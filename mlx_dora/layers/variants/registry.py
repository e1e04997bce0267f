"""Which layer a module takes under a variant and a start."""

import mlx.nn as nn

from mlx_dora.errors import DoRAError
from mlx_dora.layers._layer import DoRALayer
from mlx_dora.layers.linear import DoRALinear
from mlx_dora.layers.variants.adaptive import AdaptiveLinear
from mlx_dora.layers.variants.doran import DoRANLinear
from mlx_dora.layers.variants.doran_aux import DoRANAuxLinear
from mlx_dora.layers.variants.edora import EDoRALinear
from mlx_dora.layers.variants.magnitude import MagnitudeLinear
from mlx_dora.layers.variants.map import MAPLinear
from mlx_dora.layers.variants.pissa import PissaLinear
from mlx_dora.layers.variants.prediag import PreDiagLinear
from mlx_dora.layers.wrap import dora_class

# Ways of training DoRA's own layers.
_PLAIN = ("dora", "bidora")

# Keys are other values of `DoRAConfig.variant`, and of `DoRAConfig.init` for PiSSA.
VARIANTS: dict[str, type[DoRALinear]] = {
    "adaptive": AdaptiveLinear,
    "doran": DoRANLinear,
    "doran-aux": DoRANAuxLinear,
    "edora": EDoRALinear,
    "magnitude": MagnitudeLinear,
    "map": MAPLinear,
    "pissa": PissaLinear,
    "prediag": PreDiagLinear,
}


def layer_class(module: nn.Module, variant: str = "dora") -> type[DoRALayer]:
    """The layer that adapts `module`.

    Args:
        module: What is to be adapted.
        variant: ``"dora"``, ``"bidora"`` (the same layers) or a key of `VARIANTS`.

    Raises:
        DoRAError: If `module` is of a class that it does not adapt.
    """
    if variant in _PLAIN:
        return dora_class(module)
    layer = VARIANTS[variant]
    if type(module) not in layer.base_types:
        kind = type(module)
        raise DoRAError(
            f"{kind.__module__}.{kind.__name__} cannot take {variant}, which adapts "
            "linear layers alone (dense or packed)."
        )
    return layer
