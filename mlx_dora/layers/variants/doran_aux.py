"""DoRAN whose factors are made by small networks that a block's layers share."""

import math
from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from mlx_dora.layers.variants.doran import (
    softened_gain,
    softened_magnitude,
    start_softened,
)
from mlx_dora.layers.variants.parametrisation import Parametrisation, VariantLinear

# Mean of tanh² over the standard normal distribution.
_TANH = 0.394


class FirstLayers(nn.Module):
    """First layers of the networks that make the factors of one block's projections.

    They stand once in the model, as a child of the block's first projection: so they
    are trained, counted and stored once. The other projections only refer to it.

    Parameters: ``a`` ``(width, r)`` and ``b`` ``(r, width)``, float32, from a standard
    normal distribution.

    Args:
        width: Hidden units.
        r: Rank of the factors that are made.
    """

    def __init__(self, width: int, r: int) -> None:
        super().__init__()
        self.a = mx.random.normal((width, r))
        self.b = mx.random.normal((r, width))


class DoRANAux(Parametrisation):
    r"""DoRAN with A and B made by networks of one hidden layer.

    .. math:: A = S_A \tanh(F_A), \qquad B = \tanh(F_B)\,S_B

    The second part of DoRAN (arXiv:2510.04331). The input of a network is the number
    of a rank (one-hot), its output that column of A or row of B. The first layers F_A,
    F_B are shared by the projections of a block, the second ones S_A, S_B are the
    projection's own, and S_B starts at 0: the layer equals its base bit for bit.

    A layer made by itself has first layers of its own; `share_first_layers` joins
    several. One whose rank is below the shared r takes the leading rows and columns.

    Parameters: as `DoRAN`'s, but ``lora_a`` ``(in, width)`` is S_A and ``lora_b``
    ``(width, out)`` S_B; in one layer of a block also ``first``, see `FirstLayers`.
    Exports at rank r, as DoRAN does.

    Attributes:
        room: Hidden units for each rank.
        first: The first layers that the layer refers to, its own or another's.
    """

    name = "doran-aux"
    first: FirstLayers

    def start(self, layer: VariantLinear, r: int) -> None:
        """Start DoRAN, with first layers of the layer's own."""
        start_softened(layer)
        layer.first = FirstLayers(r, r)
        self.refer_to(layer, layer.first, r)

    def refer_to(
        self, layer: VariantLinear, first: FirstLayers, r: int, room: int = 1
    ) -> None:
        """Refer to first layers, and start the second ones anew.

        Args:
            layer: The layer of this parametrisation.
            first: First layers for rank `r` at least.
            r: Rank of the factors.
            room: Hidden units for each rank.
        """
        # Here and not in the layer: an item of a module would be a second parameter of
        # the same values, with a gradient and optimizer state of its own.
        self.first, self.room = first, room
        fan, out = layer.lora_a.shape[0], layer.lora_b.shape[1]
        bound = 1 / math.sqrt(_TANH * fan * room * r)  # A as large as DoRA's
        layer.lora_a = mx.random.uniform(-bound, bound, (fan, room * r))
        layer.lora_b = mx.zeros((room * r, out))

    def factors(self, layer: VariantLinear) -> tuple[mx.array, mx.array]:
        """A ``(in, r)`` and B ``(r, out)``, from the networks."""
        width = layer["lora_b"].shape[0]
        r, first = width // self.room, self.first
        return (
            layer["lora_a"] @ mx.tanh(first.a[:width, :r]),
            mx.tanh(first.b[:r, :width]) @ layer["lora_b"],
        )

    def gain(self, layer: VariantLinear) -> mx.array:
        """m/(n + τ), as in DoRAN."""
        return softened_gain(layer)

    def export(self, layer: VariantLinear) -> tuple[mx.array, mx.array, mx.array]:
        """The same as plain DoRA of rank r."""
        lora_a, lora_b = self.factors(layer)
        return lora_a, lora_b, softened_magnitude(layer, lora_a, lora_b)


def share_first_layers(layers: Sequence[VariantLinear], room: int) -> None:
    """Start the layers of one block anew with the same first layers.

    Args:
        layers: Layers of `DoRANAux`, as they come from their bases. The first of them
            keeps the parameters.
        room: Hidden units for each rank.
    """
    ranks = [layer.lora_b.shape[0] for layer in layers]
    first = FirstLayers(room * max(ranks), max(ranks))
    for layer, r in zip(layers, ranks, strict=True):
        layer.pop("first")
        layer.kind.refer_to(layer, first, r, room)
    layers[0].first = first
