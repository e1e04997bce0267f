"""EDoRA: DoRA with a trained core between frozen principal directions of the base."""

import mlx.core as mx

from mlx_dora.layers.variants.parametrisation import Parametrisation, VariantLinear
from mlx_dora.layers.variants.pissa import principal_factors
from mlx_dora.matrix.weight import weight_of


class EDoRA(Parametrisation):
    r"""DoRA that trains an (r, r) matrix between frozen factors.

    .. math:: y = m \circ \frac{W_0 x + s\,B\,R\,A x}{\lVert W_0 + s\,B R A \rVert} + b

    This is EDoRA (arXiv:2501.12067). With U S Vᵀ the r largest directions of W0,
    A = S·Vᵀ and B = U are frozen, as in the authors' code. There, R starts at random
    values of size 1e-5. Here it starts at 0, so that the output equals the base's bit
    for bit.

    Parameters: ``core`` ``(r, r)``, which is Rᵀ, and ``m`` ``(out,)``, float32; frozen
    ``lora_a`` ``(in, r)`` and ``lora_b`` ``(r, out)``. The exported B is BR.
    """

    name = "edora"
    fixed = ("lora_a", "lora_b")
    cached = ("m", "lora_a", "lora_b", "core")

    def start(self, layer: VariantLinear, r: int) -> None:
        """Compute A and B from the base, and set R = 0."""
        lora_a, lora_b = principal_factors(weight_of(layer.linear), r)
        root = mx.linalg.norm(lora_b, axis=1)  # √S; 0 beyond the base's directions
        layer.lora_a = lora_a * root
        layer.lora_b = lora_b / mx.where(root > 0, root, 1.0)[:, None]
        layer.core = mx.zeros((r, r))

    def factors(self, layer: VariantLinear) -> tuple[mx.array, mx.array]:
        """Return A ``(in, r)`` and BR ``(r, out)``."""
        return layer["lora_a"], layer["core"] @ layer["lora_b"]
