"""Pre-Diag: a diagonal that scales the base, and a low-rank update."""

import mlx.core as mx

from mlx_dora.errors import DoRAError
from mlx_dora.layers.variants.parametrisation import (
    Parametrisation,
    VariantLinear,
    exact_norm,
    rescaled_base,
)


class PreDiag(Parametrisation):
    r"""A diagonal that scales only the rows of the base.

    .. math:: y = d \circ (W_0 x) + s\,B(Ax) + b

    This is Pre-Diag (arXiv:2511.00051). It has no norm, so that a step reads W0 once
    less than in DoRA. Initially d = 1 and B = 0, and the output equals the base's bit
    for bit.

    Parameters: ``lora_a`` ``(in, r)``, ``lora_b`` ``(r, out)`` and ``d`` ``(out,)``,
    float32. The export has B'_j = B_j/d_j and m'_j = d_j·‖W0 + sB'A‖_j.
    """

    name = "prediag"
    has_norm = False

    def start(self, layer: VariantLinear, r: int) -> None:
        """Replace m by d = 1."""
        del layer.m
        layer.d = mx.ones_like(layer["_squared_base"])

    def gain(self, layer: VariantLinear) -> mx.array:
        """Return the diagonal d, the gain of only the base's part."""
        return layer["d"]

    def output(self, layer: VariantLinear, x: mx.array, y: mx.array) -> mx.array:
        """Return the output for input `x` and base output `y`."""
        return rescaled_base(layer, x, y, layer.scale * layer.lora_b)

    def export(self, layer: VariantLinear) -> tuple[mx.array, mx.array, mx.array]:
        """Return the equivalent plain DoRA adapter of the same rank.

        Raises:
            DoRAError: If an entry of d is 0, which removes a row of the base; no DoRA
                adapter can express this.
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
