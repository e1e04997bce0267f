"""The magnitude alone: one trained number a row."""

import mlx.core as mx

from mlx_dora.layers._base import weight_of
from mlx_dora.layers.variants.parametrisation import (
    Parametrisation,
    VariantLinear,
    scaled_sum,
)
from mlx_dora.matrix.terms import row_gain


class Magnitude(Parametrisation):
    r"""A direction that stays the base's.

    .. math:: y = \frac{m}{\lVert W_0 \rVert} \circ (W_0 x) + b

    What DoRA's own code does to its ``Wdecompose_target_modules``. At the start
    m = ‖W0‖ and the layer equals its base bit for bit.

    Parameter: ``m`` ``(out,)``, float32. Exports with A = B = 0 of rank 1.
    """

    name = "magnitude"
    has_norm = False

    def start(self, layer: VariantLinear, r: int) -> None:
        """Let go of the factors."""
        del layer.lora_a, layer.lora_b

    def factors(self, layer: VariantLinear) -> tuple[mx.array, mx.array]:
        """Zeros of rank 1."""
        out, width = weight_of(layer.linear).shape
        return mx.zeros((width, 1)), mx.zeros((1, out))

    def gain(self, layer: VariantLinear) -> mx.array:
        """m/‖W0‖."""
        return row_gain(layer.m, mx.sqrt(layer["_squared_base"]))

    def output(self, layer: VariantLinear, x: mx.array, y: mx.array) -> mx.array:
        """The output for input `x`, given the base's."""
        g = self.gain(layer)
        return scaled_sum(y, g, offset=layer.bias_offset(g))

    def export(self, layer: VariantLinear) -> tuple[mx.array, mx.array, mx.array]:
        """The same as plain DoRA of rank 1."""
        return *self.factors(layer), layer["m"]
