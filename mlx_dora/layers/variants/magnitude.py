"""Trains only the magnitude, one number per row."""

import mlx.core as mx

from mlx_dora.layers.variants.parametrisation import (
    Parametrisation,
    VariantLinear,
    rescaled_base,
)
from mlx_dora.matrix.terms import row_gain
from mlx_dora.matrix.weight import weight_of


class Magnitude(Parametrisation):
    r"""A trained magnitude with the direction of the base.

    .. math:: y = \frac{m}{\lVert W_0 \rVert} \circ (W_0 x) + b

    The DoRA authors' code does this for its ``Wdecompose_target_modules``. Initially
    m = ‖W0‖, and the output equals the base's bit for bit.

    Parameter: ``m`` ``(out,)``, float32. The exported adapter has A = B = 0 of rank 1.
    """

    name = "magnitude"
    has_norm = False

    def start(self, layer: VariantLinear, r: int) -> None:
        """Remove the factors."""
        del layer.lora_a, layer.lora_b

    def factors(self, layer: VariantLinear) -> tuple[mx.array, mx.array]:
        """Return zeros of rank 1."""
        out, width = weight_of(layer.linear).shape
        return mx.zeros((width, 1)), mx.zeros((1, out))

    def gain(self, layer: VariantLinear) -> mx.array:
        """Return m/‖W0‖."""
        return row_gain(layer.m, mx.sqrt(layer["_squared_base"]))

    def output(self, layer: VariantLinear, x: mx.array, y: mx.array) -> mx.array:
        """Return the output for input `x` and base output `y`."""
        return rescaled_base(layer, x, y)
