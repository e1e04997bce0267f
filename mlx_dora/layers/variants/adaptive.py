"""DoRA with spare ranks that can be activated during training."""

import mlx.core as mx
import numpy as np

from mlx_dora.layers.variants.parametrisation import Parametrisation, VariantLinear


class Adaptive(Parametrisation):
    r"""DoRA whose rank can change, up to twice its initial rank.

    .. math:: y = m \circ \frac{W_0 x + s\,B\,\mathrm{diag}(a)\,A x}
        {\lVert W_0 + s\,B\,\mathrm{diag}(a)\,A \rVert} + b, \qquad a_i \in \{0, 1\}

    This follows the idea of La-LoRA (doi 10.1016/j.neunet.2025.108095);
    `mlx_dora.train.ranks` sets a. Initially the first half of a is 1, and the output
    equals the base's bit for bit. Inactive ranks get no gradient.

    Parameters: ``lora_a`` ``(in, 2r)``, ``lora_b`` ``(2r, out)``, ``m`` ``(out,)``, and
    the frozen ``active`` ``(2r,)``. The exported rank is the number of active ranks.
    """

    name = "adaptive"
    room = 2
    fixed = ("active",)
    cached = ("m", "lora_a", "lora_b", "active")

    def start(self, layer: VariantLinear, r: int) -> None:
        """Make the first `r` ranks active."""
        layer.active = (mx.arange(self.room * r) < r).astype(mx.float32)

    def factors(self, layer: VariantLinear) -> tuple[mx.array, mx.array]:
        """Return A ``(in, 2r)`` and B ``(2r, out)``, with zeros for inactive ranks."""
        return layer["lora_a"], layer["lora_b"] * layer["active"][:, None]

    def activate(self, layer: VariantLinear, active: np.ndarray) -> None:
        """Select the active ranks. New ranks start with B = 0, which changes nothing.

        Args:
            layer: The layer to change.
            active: Booleans, shape ``(2r,)``, of which at least one is true.
        """
        before = np.array(layer["active"]) > 0
        new = mx.array(np.logical_and(active, ~before).astype(np.float32)) > 0
        layer.lora_b = mx.where(new[:, None], 0.0, layer["lora_b"])
        layer.active = mx.array(active.astype(np.float32))

    def export(self, layer: VariantLinear) -> tuple[mx.array, mx.array, mx.array]:
        """Return the equivalent plain DoRA adapter, with only the active ranks."""
        index = mx.array(np.flatnonzero(np.array(layer["active"])))
        return layer["lora_a"][:, index], layer["lora_b"][index], layer["m"]
