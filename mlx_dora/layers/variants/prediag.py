"""Pre-Diag: a diagonal in front of the base, beside a low-rank update."""

import mlx.core as mx

from mlx_dora.errors import DoRAError
from mlx_dora.layers.variants.parametrisation import (
    Parametrisation,
    VariantLinear,
    exact_norm,
    scaled_sum,
)


class PreDiag(Parametrisation):
    r"""A diagonal that rescales the base's rows alone.

    .. math:: y = d \circ (W_0 x) + s\,B(Ax) + b

    Pre-Diag (arXiv:2511.00051): no norm, so a step reads W0 once less than DoRA's. At
    the start d = 1 and B = 0, and the layer equals its base bit for bit.

    Parameters: ``lora_a`` ``(in, r)``, ``lora_b`` ``(r, out)`` and ``d`` ``(out,)``,
    float32. Exports with B'_j = B_j/d_j and m'_j = d_j·‖W0 + sB'A‖_j.
    """

    name = "prediag"
    has_norm = False

    def start(self, layer: VariantLinear, r: int) -> None:
        """Set d = 1 in the place of m."""
        del layer.m
        layer.d = mx.ones_like(layer["_squared_base"])

    def gain(self, layer: VariantLinear) -> mx.array:
        """The diagonal d, of the base's part alone."""
        return layer["d"]

    def output(self, layer: VariantLinear, x: mx.array, y: mx.array) -> mx.array:
        """The output for input `x`, given the base's."""
        d = self.gain(layer)
        low = layer.dropout(x) @ layer.lora_a.astype(x.dtype)
        up = layer.scale * layer.lora_b
        return scaled_sum(y, d, low, up, layer.bias_offset(d))

    def export(self, layer: VariantLinear) -> tuple[mx.array, mx.array, mx.array]:
        """The same as plain DoRA of the same rank.

        Raises:
            DoRAError: If an entry of d is 0: the base's row is gone, and no DoRA
                adapter can say that.
        """
        d, lora_a = layer["d"], layer["lora_a"]
        gone = int((d == 0).sum())
        if gone:
            raise DoRAError(
                f"Pre-Diag: {gone} entries of d are exactly 0, which no DoRA adapter "
                "can express; lower the learning rate."
            )
        lora_b = layer["lora_b"] / d
        return lora_a, lora_b, d * exact_norm(layer, lora_a, lora_b)
