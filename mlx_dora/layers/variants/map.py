"""MAP: one length and one direction for the whole matrix, not for each row."""

import mlx.core as mx

from mlx_dora.errors import DoRAError
from mlx_dora.layers.linear import DoRALinear
from mlx_dora.layers.variants._compose import scaled_sum
from mlx_dora.layers.variants._plain import exact_norm, plain_layer

EPSILON = 1e-6


class MAPLinear(DoRALinear):
    r"""A linear layer as two normalised matrices with a trained scalar each.

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

    alpha: mx.array
    beta: mx.array

    def start(self) -> None:
        """Set α = ‖W0‖_F + ε, so that W' = W0 exactly, β = 0 and a random B."""
        rank, out = self.lora_b.shape
        bound = 1 / rank**0.5
        self.lora_b = mx.random.uniform(low=-bound, high=bound, shape=(rank, out))
        self.alpha = self._base_length()
        self.beta = mx.array(0.0)

    def hold_norm(self) -> None:
        """Nothing to hold: the norms are differentiated."""

    def _base_length(self) -> mx.array:
        return mx.sqrt(self["_squared_base"].sum()) + EPSILON

    def _update_length(self) -> mx.array:
        # ‖BA‖² = ⟨AᵀA, BBᵀ⟩: arrays of (r, r).
        a, b = self["lora_a"], self["lora_b"]
        squared = ((a.T @ a) * (b @ b.T)).sum()
        lives = squared > 0  # the square root has no gradient at 0
        root = mx.sqrt(mx.where(lives, squared, 1.0))
        return mx.where(lives, root, 0.0) + EPSILON

    def adapted(self, x: mx.array, y: mx.array) -> mx.array:
        """The output for input `x`, given the base's."""
        gain = self.alpha / self._base_length()
        low = self.dropout(x) @ self.lora_a.astype(x.dtype)
        up = (self.scale * self.beta / self._update_length()) * self.lora_b
        return scaled_sum(y, gain, low, up, self.offset(gain))

    def export(self) -> DoRALinear:
        """The same as plain DoRA of the same rank.

        Raises:
            DoRAError: If α is 0: nothing is left of the base, and no DoRA adapter can
                say that.
        """
        alpha, beta, lora_a = self["alpha"], self["beta"], self["lora_a"]
        if alpha == 0:
            raise DoRAError(
                "MAP: alpha is exactly 0, which no DoRA adapter can express; lower the "
                "learning rate."
            )
        gain = alpha / self._base_length()
        lora_b = (beta / (gain * self._update_length())) * self["lora_b"]
        return plain_layer(
            self, lora_a, lora_b, gain * exact_norm(self, lora_a, lora_b)
        )
