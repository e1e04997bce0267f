"""Selects the layer that adapts a module, by its exact class and the variant."""

import mlx.nn as nn

from mlx_dora.errors import DoRAError
from mlx_dora.layers._layer import DoRALayer, unsupported
from mlx_dora.layers.embedding import DoRAEmbedding
from mlx_dora.layers.linear import DoRALinear
from mlx_dora.layers.multi import DoRAMultiLinear
from mlx_dora.layers.switch import DoRASwitchLinear
from mlx_dora.layers.tensor import DoRATensorLinear
from mlx_dora.layers.variants.adaptive import Adaptive
from mlx_dora.layers.variants.doran import DoRAN
from mlx_dora.layers.variants.doran_aux import DoRANAux
from mlx_dora.layers.variants.edora import EDoRA
from mlx_dora.layers.variants.magnitude import Magnitude
from mlx_dora.layers.variants.map import MAP
from mlx_dora.layers.variants.parametrisation import Parametrisation
from mlx_dora.layers.variants.pissa import PiSSA
from mlx_dora.layers.variants.prediag import PreDiag

_LAYERS: dict[type[nn.Module], type[DoRALayer]] = {
    cls: layer
    for layer in (DoRALinear, DoRAEmbedding, DoRATensorLinear)
    for cls in layer.base_types()
}
_HOST_LAYERS = (DoRASwitchLinear, DoRAMultiLinear)
"""Layers for experts and heads, whose classes are mlx-lm's."""

# Variants that train the plain DoRA layers.
_PLAIN = ("dora", "bidora")

VARIANTS: dict[str, type[Parametrisation]] = {
    kind.name: kind
    for kind in (Adaptive, DoRAN, DoRANAux, EDoRA, Magnitude, MAP, PiSSA, PreDiag)
}
"""Parametrizations by the value of `DoRAConfig.variant`, or ``init`` for PiSSA."""


def dora_class(module: nn.Module) -> type[DoRALayer]:
    """Return the class of the plain DoRA layer that adapts `module`.

    Raises:
        DoRAError: If `module` is of any other class, subclasses included.
    """
    known = _LAYERS
    if type(module).__module__.startswith("mlx_lm."):  # then it is imported already
        hosts = {cls: layer for layer in _HOST_LAYERS for cls in layer.base_types()}
        known = _LAYERS | hosts
    if type(module) not in known:
        raise unsupported(module, tuple(known))
    return known[type(module)]


def check_adaptable(module: nn.Module, variant: str = "dora") -> None:
    """Check that a variant can adapt a module.

    Args:
        module: The module to adapt.
        variant: ``"dora"``, ``"bidora"`` (the same layers) or a key of `VARIANTS`.

    Raises:
        DoRAError: If the variant does not adapt the class of `module`.
    """
    if variant in _PLAIN:
        dora_class(module)
    elif type(module) not in DoRALinear.base_types():
        kind = type(module)
        raise DoRAError(
            f"{kind.__module__}.{kind.__name__} cannot take {variant}, which adapts "
            "only linear layers (dense or packed)."
        )


def adapt(
    module: nn.Module,
    variant: str = "dora",
    *,
    r: int = 8,
    dropout: float = 0.0,
    scale: float = 20.0,
) -> DoRALayer:
    """Wrap a module with the layer that adapts it, at its initial values.

    Args:
        module: The module to adapt.
        variant: ``"dora"``, ``"bidora"`` (the same layers) or a key of `VARIANTS`.
        r: Rank of the update.
        dropout: Dropout probability in the low-rank branch.
        scale: Multiplier s of the update.

    Raises:
        DoRAError: If the variant does not adapt the class of `module`.
    """
    check_adaptable(module, variant)
    if variant in _PLAIN:
        return dora_class(module).from_base(module, r, dropout, scale)
    return VARIANTS[variant].adapt(module, r, dropout, scale)


def is_adapted_as(layer: DoRALayer, variant: str) -> bool:
    """Return whether `adapt` makes this kind of layer for a variant."""
    return layer.kind.name == ("dora" if variant in _PLAIN else variant)
