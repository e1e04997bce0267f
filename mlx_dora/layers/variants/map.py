"""MAP: one length and one direction for the whole matrix, not for each row."""

import mlx.core as mx

from mlx_dora.errors import DoRAError
from mlx_dora.layers.variants.parametrisation import (
    Parametrisation,
    VariantLinear,
    exact_norm,
    scaled_sum,
)

EPSILON = 1e-6


class MAP(Parametrisation):
    r"""Two normalised matrices with a trained scalar each.

    .. math:: W' = \alpha \frac{W_0}{\lVert W_0 \rVert_F + \epsilon}
        + s\,\beta \frac{BA}{\lVert BA \rVert_F + \epsilon}

    MAP (arXiv:2505.23094), ε = 1e-6, the norms not constant in the backward pass. The
    paper starts at β = 1 and B = 0, where the gradient of B is multiplied by 1/ε and
    one step, however small, makes the update's norm β. Here A and B both start at
    random and β at 0: the layer equals its base bit for bit, and the update grows from
    nothing. s multiplies β: the step of a lone scalar would otherwise set its pace.

    Parameters: ``lora_a`` ``(in, r)``, ``lora_b`` ``(r, out)``, ``alpha`` and ``beta``
    ``()``, float32. Exports with B' = B·β(‖W0‖_F + ε)/(α(‖BA‖_F + ε)) and
    m' = α/(‖W0‖_F + ε)·‖W0 + sB'A‖ of each row.
    """

    name = "map"
    has_norm = False

    def start(self, layer: VariantLinear, r: int) -> None:
        """Set α = ‖W0‖_F + ε, so that W' = W0 exactly, β = 0 and a random B."""
        del layer.m
        rank, out = layer.lora_b.shape
        bound = 1 / rank**0.5
        layer.lora_b = mx.random.uniform(low=-bound, high=bound, shape=(rank, out))
        layer.alpha = _base_length(layer)
        layer.beta = mx.array(0.0)

    def gain(self, layer: VariantLinear) -> mx.array:
        """α/(‖W0‖_F + ε), of the base's part alone."""
        return layer["alpha"] / _base_length(layer)

    def output(self, layer: VariantLinear, x: mx.array, y: mx.array) -> mx.array:
        """The output for input `x`, given the base's."""
        g = self.gain(layer)
        low = layer.dropout(x) @ layer.lora_a.astype(x.dtype)
        up = (layer.scale * layer["beta"] / _update_length(layer)) * layer.lora_b
        return scaled_sum(y, g, low, up, layer.bias_offset(g))

    def export(self, layer: VariantLinear) -> tuple[mx.array, mx.array, mx.array]:
        """The same as plain DoRA of the same rank.

        Raises:
            DoRAError: If α is 0: nothing is left of the base, and no DoRA adapter can
                say that.
        """
        alpha, beta, lora_a = layer["alpha"], layer["beta"], layer["lora_a"]
        if alpha == 0:
            raise DoRAError(
                "MAP: alpha is exactly 0, which no DoRA adapter can express; lower the "
                "learning rate."
            )
        g = self.gain(layer)
        lora_b = (beta / (g * _update_length(layer))) * layer["lora_b"]
        return lora_a, lora_b, g * exact_norm(layer, lora_a, lora_b)


def _base_length(layer: VariantLinear) -> mx.array:
    return mx.sqrt(layer["_squared_base"].sum()) + EPSILON


def _update_length(layer: VariantLinear) -> mx.array:
    # ‖BA‖² = ⟨AᵀA, BBᵀ⟩: arrays of (r, r).
    a, b = layer["lora_a"], layer["lora_b"]
    squared = ((a.T @ a) * (b @ b.T)).sum()
    lives = squared > 0  # the square root has no gradient at 0
    root = mx.sqrt(mx.where(lives, squared, 1.0))
    return mx.where(lives, root, 0.0) + EPSILON
