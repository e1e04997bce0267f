"""DoRA with room for more ranks than it uses, to be dealt out during training."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_dora.layers.linear import DoRALinear
from mlx_dora.layers.variants._plain import plain_layer


class AdaptiveLinear(DoRALinear):
    r"""DoRA whose rank can change, up to twice the one it starts with.

    .. math:: y = m \circ \frac{W_0 x + s\,B\,\mathrm{diag}(a)\,A x}
        {\lVert W_0 + s\,B\,\mathrm{diag}(a)\,A \rVert} + b, \qquad a_i \in \{0, 1\}

    In the spirit of La-LoRA (doi 10.1016/j.neunet.2025.108095); who sets a is
    `mlx_dora.train.ranks`. At the start the first half of a is 1, and the layer equals
    its base bit for bit. What is not active gets no gradient.

    Parameters: ``lora_a`` ``(in, 2r)``, ``lora_b`` ``(2r, out)``, ``m`` ``(out,)``, and
    the frozen ``active`` ``(2r,)``. Exports at the number of active ranks.
    """

    room = 2
    fixed = ("active",)
    cached = (*DoRALinear.cached, *fixed)
    active: mx.array

    def adapt(self, base: nn.Module, r: int, dropout: float, scale: float) -> None:
        """Take a base and start from it with `r` of the ranks active."""
        super().adapt(base, self.room * r, dropout, scale)
        self.active = (mx.arange(self.room * r) < r).astype(mx.float32)
        self.freeze(keys=["active"], recurse=False)

    def factors(self) -> tuple[mx.array, mx.array]:
        """A ``(in, 2r)``, and B ``(2r, out)`` with zeros where nothing is active."""
        return self["lora_a"], self["lora_b"] * self["active"][:, None]

    def activate(self, active: np.ndarray) -> None:
        """Choose the ranks: a new one starts with B = 0, and so changes nothing.

        Args:
            active: Booleans, shape ``(2r,)``, at least one true.
        """
        before = np.array(self["active"]) > 0
        new = mx.array(np.logical_and(active, ~before).astype(np.float32)) > 0
        self.lora_b = mx.where(new[:, None], 0.0, self["lora_b"])
        self.active = mx.array(active.astype(np.float32))

    def export(self) -> DoRALinear:
        """The same as plain DoRA of the active ranks alone."""
        index = mx.array(np.flatnonzero(np.array(self["active"])))
        lora_a, lora_b = self["lora_a"][:, index], self["lora_b"][index]
        return plain_layer(self, lora_a, lora_b, self["m"])
