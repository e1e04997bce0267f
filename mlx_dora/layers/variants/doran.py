"""DoRAN: DoRA with a trained term in the denominator."""

import mlx.core as mx
import mlx.nn as nn

from mlx_dora.layers.variants.parametrisation import (
    Parametrisation,
    VariantLinear,
    exact_norm,
)

# Of the base's mean row norm: where tau starts.
_SHARE = 0.1


class DoRAN(Parametrisation):
    r"""DoRA whose normalisation is softened by a trained positive scalar.

    .. math:: y = m \circ \frac{W_0 x + s\,B(Ax)}{\lVert W_0 + s\,BA \rVert + \tau} + b

    DoRAN (arXiv:2510.04331), τ = softplus(t). The norm is a constant in the backward
    pass as in DoRA, τ is not. At the start τ is a tenth of the mean row norm,
    m = ‖W0‖ + τ and B = 0: the layer equals its base bit for bit. A row of W0 that is
    zero can be trained here, unlike in DoRA.

    Parameters: as `DoRALinear`'s, and ``t`` ``()``, float32. Exports with
    m' = m·n/(n + τ), n = ‖W0 + sBA‖.
    """

    name = "doran"

    def start(self, layer: VariantLinear, r: int) -> None:
        """Set τ, and m = ‖W0‖ + τ."""
        start_softened(layer)

    def gain(self, layer: VariantLinear) -> mx.array:
        """m/(n + τ)."""
        return softened_gain(layer)

    def export(self, layer: VariantLinear) -> tuple[mx.array, mx.array, mx.array]:
        """The same as plain DoRA of the same rank."""
        lora_a, lora_b = self.factors(layer)
        return lora_a, lora_b, softened_magnitude(layer, lora_a, lora_b)


def start_softened(layer: VariantLinear) -> None:
    """Set t for a τ of a tenth of the mean row norm, and m = ‖W0‖ + τ."""
    size = mx.maximum(_SHARE * layer.m.mean(), 1e-6)
    layer.t = size + mx.log(-mx.expm1(-size))  # softplus backwards
    layer.m = layer.m + nn.softplus(layer.t)


def softened_gain(layer: VariantLinear) -> mx.array:
    """m/(n + τ) of each row, τ = softplus(t) positive."""
    return layer["m"] / (layer.norm() + nn.softplus(layer["t"]))


def softened_magnitude(
    layer: VariantLinear, lora_a: mx.array, lora_b: mx.array
) -> mx.array:
    """Magnitude m·n/(n + τ), which gives plain DoRA the same gain."""
    norm = exact_norm(layer, lora_a, lora_b)
    return layer["m"] * norm / (norm + nn.softplus(layer["t"]))
