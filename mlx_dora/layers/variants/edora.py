"""EDoRA: DoRA between frozen principal directions of the base."""

import mlx.core as mx

from mlx_dora.layers._base import weight_of
from mlx_dora.layers.linear import DoRALinear
from mlx_dora.layers.variants._plain import plain_layer
from mlx_dora.layers.variants.pissa import principal_factors


class EDoRALinear(DoRALinear):
    r"""DoRA that trains an (r, r) matrix between frozen factors.

    .. math:: y = m \circ \frac{W_0 x + s\,B\,R\,A x}{\lVert W_0 + s\,B R A \rVert} + b

    EDoRA (arXiv:2501.12067): with U S Vᵀ the r largest directions of W0, A = S·Vᵀ and
    B = U are frozen, as in its authors' code. There R starts at random, of size 1e-5;
    here at 0, so that the layer equals its base bit for bit.

    Parameters: ``core`` ``(r, r)``, which is Rᵀ, and ``m`` ``(out,)``, float32; frozen
    ``lora_a`` ``(in, r)`` and ``lora_b`` ``(r, out)``. Exports with B' = BR.
    """

    fixed = ("lora_a", "lora_b")
    cached = (*DoRALinear.cached, "core")
    core: mx.array

    def start(self) -> None:
        """Take A and B from the base, R = 0, m from the base's rows."""
        super().start()
        rank = self.lora_a.shape[1]
        down, up = principal_factors(weight_of(self.linear), rank)
        root = mx.linalg.norm(up, axis=1)  # √S; 0 where there are fewer directions
        self.lora_a = down * root
        self.lora_b = up / mx.where(root > 0, root, 1.0)[:, None]
        self.core = mx.zeros((rank, rank))
        self.freeze(keys=list(self.fixed), recurse=False)

    def factors(self) -> tuple[mx.array, mx.array]:
        """A ``(in, r)`` and BR ``(r, out)``."""
        return self["lora_a"], self["core"] @ self["lora_b"]

    def export(self) -> DoRALinear:
        """The same as plain DoRA of the same rank."""
        return plain_layer(self, *self.factors(), self["m"])
