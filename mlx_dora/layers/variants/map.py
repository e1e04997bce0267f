"""MAP: a length and a direction of the whole matrix instead of each row."""

import mlx.core as mx

from mlx_dora.errors import DoRAError
from mlx_dora.layers.variants.parametrisation import (
    Parametrisation,
    VariantLinear,
    exact_norm,
    rescaled_base,
)

EPSILON = 1e-6


class MAP(Parametrisation):
    r"""Two normalized matrices, each with a trained scalar.

    .. math:: W' = \alpha \frac{W_0}{\lVert W_0 \rVert_F + \epsilon}
        + s\,\beta \frac{BA}{\lVert BA \rVert_F + \epsilon}

    This is MAP (arXiv:2505.23094), with ε = 1e-6 and gradients through the norms. The
    paper starts at β = 1 and B = 0. There the gradient of B is multiplied by 1/ε, and
    even a tiny step makes the norm of the update β. Here A and B start at random values
    and β at 0: the output equals the base's bit for bit, and the update grows from 0.
    The scale s multiplies β, because the step of a single scalar would otherwise limit
    how fast the update grows.

    Parameters: ``lora_a`` ``(in, r)``, ``lora_b`` ``(r, out)``, ``alpha`` and ``beta``
    ``()``, float32. The export has B' = B·β(‖W0‖_F + ε)/(α(‖BA‖_F + ε)) and, for each
    row, m' = α/(‖W0‖_F + ε)·‖W0 + sB'A‖.
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
        """Return α/(‖W0‖_F + ε), the gain of only the base's part."""
        return layer["alpha"] / _base_length(layer)

    def output(self, layer: VariantLinear, x: mx.array, y: mx.array) -> mx.array:
        """Return the output for input `x` and base output `y`."""
        up = (layer.scale * layer["beta"] / _update_length(layer)) * layer.lora_b
        return rescaled_base(layer, x, y, up)

    def export(self, layer: VariantLinear) -> tuple[mx.array, mx.array, mx.array]:
        """Return the equivalent plain DoRA adapter of the same rank.

        Raises:
            DoRAError: If α is 0, which removes the base; no DoRA adapter can express
                this.
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
    # ‖BA‖² = ⟨AᵀA, BBᵀ⟩, which needs only (r, r) arrays.
    a, b = layer["lora_a"], layer["lora_b"]
    squared = ((a.T @ a) * (b @ b.T)).sum()
    lives = squared > 0  # the square root has no gradient at 0
    root = mx.sqrt(mx.where(lives, squared, 1.0))
    return mx.where(lives, root, 0.0) + EPSILON
