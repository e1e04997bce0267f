"""DoRAN: DoRA with a trained term in the denominator."""

import mlx.core as mx
import mlx.nn as nn

from mlx_dora.kernels import dora_scale
from mlx_dora.layers.linear import DoRALinear
from mlx_dora.layers.variants._plain import exact_norm, plain_layer

# Of the base's mean row norm: where tau starts.
_SHARE = 0.1


class DoRANLinear(DoRALinear):
    r"""DoRA whose normalisation is softened by a trained positive scalar.

    .. math:: y = m \circ \frac{W_0 x + s\,B(Ax)}{\lVert W_0 + s\,BA \rVert + \tau} + b

    DoRAN (arXiv:2510.04331), τ = softplus(t). The norm is a constant in the backward
    pass as in DoRA, τ is not. At the start τ is a tenth of the mean row norm,
    m = ‖W0‖ + τ and B = 0: the layer equals its base bit for bit. A row of W0 that is
    zero can be trained here, unlike in DoRA.

    Parameters: as `DoRALinear`'s, and ``t`` ``()``, float32. Exports with
    m' = m·n/(n + τ), n = ‖W0 + sBA‖.
    """

    t: mx.array

    def start(self) -> None:
        """Set τ, and m = ‖W0‖ + τ."""
        super().start()
        size = mx.maximum(_SHARE * self.m.mean(), 1e-6)
        self.t = size + mx.log(-mx.expm1(-size))  # softplus backwards
        self.m = self.m + self.tau()

    def tau(self) -> mx.array:
        """τ, positive. Shape ``()``."""
        return nn.softplus(self.t)

    def adapted(self, x: mx.array, y: mx.array) -> mx.array:
        """The output for input `x`, given the base's."""
        gain = self.m / (self.norm() + self.tau())
        down, up = self.factors()
        h = self.dropout(x) @ down.astype(x.dtype)
        one = mx.ones_like(gain)
        return dora_scale(y, h, up, self.scale, gain, one, self.offset(gain))

    def export(self) -> DoRALinear:
        """The same as plain DoRA of the same rank."""
        down, up = self.factors()
        norm = exact_norm(self, down, up)
        return plain_layer(self, down, up, self["m"] * norm / (norm + self.tau()))
