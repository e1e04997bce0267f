"""PiSSA: DoRA initialized with the principal directions of the base."""

from typing import cast

import mlx.core as mx
import numpy as np

from mlx_dora.layers.variants.parametrisation import Parametrisation, VariantLinear
from mlx_dora.matrix.weight import Weight, row_blocks, weight_of

_PASSES = 8  # passes of subspace iteration
_SPARE = 8  # directions to iterate in addition to the rank


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
    out, width = weight.shape
    count = min(rank + _SPARE, out, width)
    basis = np.array(mx.random.normal((width, count)))
    for _ in range(_PASSES):
        directions = mx.array(_orthogonal(basis))
        total = mx.zeros((width, count))
        for _, block in row_blocks(weight):
            full = block.astype(mx.float32)
            total = total + full.T @ (full @ directions)
            mx.eval(total)
        basis = np.array(total)
    right = _orthogonal(basis)
    directions = mx.array(right)
    parts = [block.astype(mx.float32) @ directions for _, block in row_blocks(weight)]
    left, sizes, mixed = np.linalg.svd(
        np.array(mx.concatenate(parts), np.float64), full_matrices=False
    )
    root = np.sqrt(sizes[:rank])
    lora_a = (right @ mixed.T)[:, :rank] * root
    lora_b = (left[:, :rank] * root).T
    lacking = rank - root.size
    lora_a, lora_b = (
        np.pad(lora_a, ((0, 0), (0, lacking))),
        np.pad(lora_b, ((0, lacking), (0, 0))),
    )
    factors = mx.array(lora_a.astype(np.float32)), mx.array(lora_b.astype(np.float32))
    mx.eval(*factors)
    return factors


def _orthogonal(basis: np.ndarray) -> np.ndarray:
    return cast(np.ndarray, np.linalg.qr(basis)[0]).astype(np.float32)
