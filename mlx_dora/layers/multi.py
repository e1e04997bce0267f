"""DoRA for the heads of latent attention, `MultiLinear` and `QuantizedMultiLinear`."""

from typing import TYPE_CHECKING, ClassVar

import mlx.core as mx
import mlx.nn as nn

from mlx_dora.layers._layer import DoRALayer

if TYPE_CHECKING:
    from mlx_lm.models.mla import MultiLinear, QuantizedMultiLinear


class DoRAMultiLinear(DoRALayer):
    r"""One adapted matrix per head, which is multiplied from both sides.

    .. math:: W'_h = g_h \circ (W_h + s\,B_hA_h), \qquad
        g_h = m_h / \lVert W_h + s\,B_hA_h \rVert

    This is Eq. 5 of DoRA (arXiv:2402.09353) for each head h, with one norm per row of
    the stored weight, which is a constant in the backward pass. Latent attention
    multiplies by the same matrix or by its transpose:

    .. math:: x W'^\top_h = g_h \circ (x W^\top_h + s\,(x A_h) B_h), \qquad
        x W'_h = (x \circ g_h) W_h + s\,\bigl((x \circ g_h) B^\top_h\bigr) A^\top_h

    Initially, both equal the base's output bit for bit.

    Parameters: ``lora_a`` ``(heads, r, input_dims)``, ``lora_b``
    ``(heads, output_dims, r)`` and ``m`` ``(heads, output_dims)``, float32. The input
    is ``(..., heads or 1, tokens, input_dims)``; with ``transpose=False`` its last axis
    is ``output_dims``.

    Attributes:
        linear: The frozen base.
        enabled: If False, the layer computes the output of its base.

    Args:
        input_dims: Width of the stored matrices.
        output_dims: Number of rows of the stored matrices.
        num_heads: Number of matrices.
        r: Rank of the update.
        dropout: Dropout probability for inputs of the low-rank branch.
        scale: Multiplier s of the update.
    """

    base_name: ClassVar[str] = "linear"
    layout = "stack"
    linear: "MultiLinear | QuantizedMultiLinear"

    def __init__(
        self,
        input_dims: int,
        output_dims: int,
        num_heads: int,
        r: int = 8,
        dropout: float = 0.0,
        scale: float = 20.0,
    ) -> None:
        from mlx_lm.models.mla import MultiLinear

        super().__init__()
        base = MultiLinear(input_dims, output_dims, num_heads)
        self._adapt(base, r, dropout, scale)

    @classmethod
    def base_types(cls) -> tuple[type[nn.Module], ...]:
        """Return the classes of modules that this layer can wrap."""
        from mlx_lm.models.mla import MultiLinear, QuantizedMultiLinear

        return MultiLinear, QuantizedMultiLinear

    def __call__(self, x: mx.array, transpose: bool = True) -> mx.array:
        """Multiply by every head's matrix or its transpose.

        Args:
            x: Input, shape ``(..., heads or 1, tokens, in)``; if not `transpose`, the
                last axis is ``out``.
            transpose: Multiply by the transposed matrix, as a linear layer does.

        Returns:
            Output, shape ``(..., heads, tokens, out)``, in the base's dtype; if not
            `transpose`, the last axis is ``in``.
        """
        if not self.enabled:
            return self.linear(x, transpose=transpose)
        gain = self.gain()
        a, b = self.factors()
        low = self.dropout(x)
        if transpose:
            y = self.linear(x)
            h = self.scale * (low @ a.astype(x.dtype)).astype(mx.float32)
            update = h @ b.astype(mx.float32)
            adapted = gain[:, None, :] * (y.astype(mx.float32) + update)
            return adapted.astype(y.dtype)
        # Multiply g into B, which needs no copy of x for each head.
        gained = (gain[:, None, :] * b).swapaxes(-1, -2)  # (heads, out, r)
        h = self.scale * (low @ gained.astype(x.dtype)).astype(mx.float32)
        update = h @ a.swapaxes(-1, -2).astype(mx.float32)
        if x.dtype == mx.float32:
            y = self.linear(x * gain[:, None, :], transpose=False)
            return (y.astype(mx.float32) + update).astype(y.dtype)
        # Half precision cannot resolve x∘g − x: multiply the difference separately.
        y = self.linear(x, transpose=False)
        moved = (x.astype(mx.float32) * (gain - 1)[:, None, :]).astype(x.dtype)
        extra = self.linear(moved, transpose=False).astype(mx.float32)
        return (y.astype(mx.float32) + extra + update).astype(y.dtype)
