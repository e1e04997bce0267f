"""Pre-Diag: a diagonal in front of the base, beside a low-rank update."""

import mlx.core as mx

from mlx_dora.errors import DoRAError
from mlx_dora.layers.linear import DoRALinear
from mlx_dora.layers.variants._compose import scaled_sum
from mlx_dora.layers.variants._plain import exact_norm, plain_layer


class PreDiagLinear(DoRALinear):
    r"""A linear layer that rescales the base's rows alone.

    .. math:: y = d \circ (W_0 x) + s\,B(Ax) + b

    Pre-Diag (arXiv:2511.00051): no norm, so a step reads W0 once less than DoRA's. At
    the start d = 1 and B = 0, and the layer equals its base bit for bit.

    Parameters: ``lora_a`` ``(in, r)``, ``lora_b`` ``(r, out)`` and ``d`` ``(out,)``,
    float32. Exports with B'_j = B_j/d_j and m'_j = d_j·‖W0 + sB'A‖_j.
    """

    d: mx.array

    def start(self) -> None:
        """Set d = 1."""
        self.d = mx.ones_like(self["_squared_base"])

    def hold_norm(self) -> None:
        """Nothing to hold: there is no norm."""

    def adapted(self, x: mx.array, y: mx.array) -> mx.array:
        """The output for input `x`, given the base's."""
        low = self.dropout(x) @ self.lora_a.astype(x.dtype)
        return scaled_sum(y, self.d, low, self.scale * self.lora_b, self.offset(self.d))

    def export(self) -> DoRALinear:
        """The same as plain DoRA of the same rank.

        Raises:
            DoRAError: If an entry of d is 0: the base's row is gone, and no DoRA
                adapter can say that.
        """
        d, lora_a = self["d"], self["lora_a"]
        gone = int((d == 0).sum())
        if gone:
            raise DoRAError(
                f"Pre-Diag: {gone} entries of d are exactly 0, which no DoRA adapter "
                "can express; lower the learning rate."
            )
        lora_b = self["lora_b"] / d
        return plain_layer(self, lora_a, lora_b, d * exact_norm(self, lora_a, lora_b))
