"""DoRA for the heads of latent attention, `MultiLinear` and `QuantizedMultiLinear`."""

from typing import ClassVar

import mlx.core as mx
from mlx_lm.models.mla import MultiLinear, QuantizedMultiLinear

from mlx_dora.layers._layer import DoRALayer
from mlx_dora.layers.layout import STACK


class DoRAMultiLinear(DoRALayer):
    r"""A matrix a head, used from both sides, with trained magnitude and direction.

    .. math:: W'_h = g_h \circ (W_h + s\,B_hA_h), \qquad
        g_h = m_h / \lVert W_h + s\,B_hA_h \rVert

    Eq. 5 of DoRA (arXiv:2402.09353) for each head h, one norm per row of the stored
    weight, a constant in the backward pass. Latent attention multiplies by the same
    matrix from the left or from the right:

    .. math:: x W'^\top_h = g_h \circ (x W^\top_h + s\,(x A_h) B_h), \qquad
        x W'_h = (x \circ g_h) W_h + s\,\bigl((x \circ g_h) B^\top_h\bigr) A^\top_h

    At the start both equal the base bit for bit.

    Parameters: ``lora_a`` ``(heads, r, input_dims)``, ``lora_b``
    ``(heads, output_dims, r)`` and ``m`` ``(heads, output_dims)``, float32. Input
    ``(..., heads or 1, tokens, input_dims)``, with ``transpose=False``
    ``(..., output_dims)``.

    Attributes:
        linear: The frozen base.
        enabled: False makes the layer its base, m included.

    Args:
        input_dims: Width of the stored matrices.
        output_dims: Their number of rows.
        num_heads: Number of matrices.
        r: Rank of the update.
        dropout: Probability of dropping an input of the low-rank branch.
        scale: Multiplier s of the update.
    """

    base_name: ClassVar[str] = "linear"
    layout = STACK
    base_types = (MultiLinear, QuantizedMultiLinear)
    linear: MultiLinear | QuantizedMultiLinear

    def __init__(
        self,
        input_dims: int,
        output_dims: int,
        num_heads: int,
        r: int = 8,
        dropout: float = 0.0,
        scale: float = 20.0,
    ) -> None:
        super().__init__()
        base = MultiLinear(input_dims, output_dims, num_heads)
        self._adapt(base, r, dropout, scale)

    def __call__(self, x: mx.array, transpose: bool = True) -> mx.array:
        """The product with every head's matrix, or with its transpose.

        Args:
            x: Shape ``(..., heads, tokens, in)``, or 1 for heads; ``out`` for ``in`` if
                not `transpose`.
            transpose: Multiply by the transposed matrix, as a linear layer does.

        Returns:
            Shape ``(..., heads, tokens, out)``, ``in`` for ``out`` if not `transpose`;
            in the base's dtype.
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
        # g goes to B's side, where it costs no copy of x for each head.
        gained = (gain[:, None, :] * b).swapaxes(-1, -2)  # (heads, out, r)
        h = self.scale * (low @ gained.astype(x.dtype)).astype(mx.float32)
        update = h @ a.swapaxes(-1, -2).astype(mx.float32)
        if x.dtype == mx.float32:
            y = self.linear(x * gain[:, None, :], transpose=False)
            return (y.astype(mx.float32) + update).astype(y.dtype)
        # Half precision cannot tell x∘g from x: its difference is a product of its own.
        y = self.linear(x, transpose=False)
        moved = (x.astype(mx.float32) * (gain - 1)[:, None, :]).astype(x.dtype)
        extra = self.linear(moved, transpose=False).astype(mx.float32)
        return (y.astype(mx.float32) + extra + update).astype(y.dtype)
