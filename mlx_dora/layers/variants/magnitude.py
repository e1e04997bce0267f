"""The magnitude alone: one trained number a row."""

import mlx.core as mx

from mlx_dora.kernels.reference import row_gain
from mlx_dora.layers._base import weight_of
from mlx_dora.layers.linear import DoRALinear
from mlx_dora.layers.variants._compose import scaled_sum
from mlx_dora.layers.variants._plain import plain_layer


class MagnitudeLinear(DoRALinear):
    r"""A linear layer whose direction stays the base's.

    .. math:: y = \frac{m}{\lVert W_0 \rVert} \circ (W_0 x) + b

    What DoRA's own code does to its ``Wdecompose_target_modules``. At the start
    m = ‖W0‖ and the layer equals its base bit for bit.

    Parameter: ``m`` ``(out,)``, float32. Exports with A = B = 0 of rank 1.
    """

    def start(self) -> None:
        """Set m = ‖W0‖, and let go of the factors."""
        super().start()
        del self.lora_a, self.lora_b

    def norm(self) -> mx.array:
        """‖W0‖ of each row. Shape ``(out,)``, float32."""
        return mx.sqrt(self["_squared_base"])

    def adapted(self, x: mx.array, y: mx.array) -> mx.array:
        """The output for input `x`, given the base's."""
        gain = row_gain(self.m, self.norm())
        return scaled_sum(y, gain, offset=self.offset(gain))

    def export(self) -> DoRALinear:
        """The same as plain DoRA of rank 1."""
        out, width = weight_of(self.linear).shape
        return plain_layer(self, mx.zeros((width, 1)), mx.zeros((1, out)), self["m"])
