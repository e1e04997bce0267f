"""PiSSA: DoRA initialized with the principal directions of the base."""

import mlx.core as mx

from mlx_dora.layers.variants.parametrisation import Parametrisation, VariantLinear
from mlx_dora.matrix.subspace import principal_part
from mlx_dora.matrix.weight import Weight, row_blocks, weight_of

_PASSES = 8  # passes of subspace iteration


class PiSSA(Parametrisation):
    r"""DoRA whose low-rank part is initialized with the largest directions of W0.

    .. math:: y = m \circ \frac{W_0 x + s\,(B(Ax) - B_0(A_0x))}
        {\lVert W_0 + s\,(BA - B_0A_0) \rVert} + b

    PiSSA (arXiv:2404.02948). With :math:`s B_0A_0` the best rank-r approximation of
    W0, A and B start at A0 = √(S/s)·Vᵀ and B0 = U·√(S/s), and the frozen residual is
    W0 − s·B0A0. The residual is not built: the layer stores A0 and B0, and the base
    keeps its weight, packed or not. Initially, the output equals the base's up to
    rounding.

    Parameters: those of `DoRALinear`, and frozen ``start_a`` ``(in, r)`` and
    ``start_b`` ``(r, out)``. The export has rank 2r: A' = [A, A0], B' = [B; −B0].
    """

    name = "pissa"
    fixed = ("start_a", "start_b")
    cached = ("m", "lora_a", "lora_b", *fixed)

    def start(self, layer: VariantLinear, r: int) -> None:
        """Compute A0 and B0 from the base, and copy them to A and B."""
        lora_a, lora_b = principal_factors(weight_of(layer.linear), r)
        size = 1 / layer.scale**0.5
        layer.start_a, layer.start_b = lora_a * size, lora_b * size
        layer.lora_a, layer.lora_b = layer.start_a, layer.start_b

    def factors(self, layer: VariantLinear) -> tuple[mx.array, mx.array]:
        """Return [A, A0] and [B; −B0], the update of the original base, of rank 2r."""
        return (
            mx.concatenate([layer["lora_a"], layer["start_a"]], axis=1),
            mx.concatenate([layer["lora_b"], -layer["start_b"]]),
        )


def principal_factors(weight: Weight, rank: int) -> tuple[mx.array, mx.array]:
    """Approximate √S·Vᵀ and U·√S of the largest singular values of a weight.

    The accuracy suffices for initial values. Subspace iteration starts from MLX's
    random state and reads the weight in blocks of rows, without a dense copy.

    Args:
        weight: Weight, shape ``(out, in)``, dense or packed.
        rank: Number of singular values.

    Returns:
        A ``(in, rank)`` and B ``(rank, out)``, float32, evaluated, and zero beyond the
        number of directions of the matrix.
    """
    shape = (weight.shape[0], weight.shape[1])
    part = principal_part(
        lambda: row_blocks(weight), shape, rank, tolerance=None, passes=_PASSES
    )
    factors = part.factors(rank)
    mx.eval(*factors)
    return factors
