"""DoRAN: DoRA with a trained term in the denominator."""

import mlx.core as mx
import mlx.nn as nn

from mlx_dora.layers.variants.parametrisation import (
    Parametrisation,
    VariantLinear,
    exact_norm,
)

# Initial value of tau, as a share of the base's mean row norm.
_SHARE = 0.1


class DoRAN(Parametrisation):
    r"""DoRA whose normalization is softened by a trained positive scalar.

    .. math:: y = m \circ \frac{W_0 x + s\,B(Ax)}{\lVert W_0 + s\,BA \rVert + \tau} + b

    This is DoRAN (arXiv:2510.04331), with τ = softplus(t). As in DoRA, the norm is a
    constant in the backward pass, but τ is not. Initially τ is a tenth of the mean row
    norm, m = ‖W0‖ + τ and B = 0: the output equals the base's bit for bit. Unlike in
    DoRA, a zero row of W0 can be trained.

    Parameters: those of `DoRALinear`, and ``t`` ``()``, float32. The exported magnitude
    is m' = m·n/(n + τ), with n = ‖W0 + sBA‖.
    """

    name = "doran"

    def start(self, layer: VariantLinear, r: int) -> None:
        """Set t so that τ is a tenth of the mean row norm, and m = ‖W0‖ + τ."""
        size = mx.maximum(_SHARE * layer.m.mean(), 1e-6)
        layer.t = size + mx.log(-mx.expm1(-size))  # inverse of softplus
        layer.m = layer.m + nn.softplus(layer.t)

    def gain(self, layer: VariantLinear) -> mx.array:
        """Return m/(n + τ) of each row, with τ = softplus(t) > 0."""
        return layer["m"] / (layer.norm() + nn.softplus(layer["t"]))

    def export(self, layer: VariantLinear) -> tuple[mx.array, mx.array, mx.array]:
        """Return the equivalent plain DoRA adapter of the same rank."""
        lora_a, lora_b = self.factors(layer)
        norm = exact_norm(layer, lora_a, lora_b)
        return lora_a, lora_b, layer["m"] * norm / (norm + nn.softplus(layer["t"]))
