"""Heads of latent attention with an adapter for each row of the batch."""

from typing import TYPE_CHECKING, ClassVar

import mlx.core as mx

from mlx_dora.layers.gathered.layer import GatheredLayer

if TYPE_CHECKING:
    from mlx_lm.models.mla import MultiLinear, QuantizedMultiLinear


class GatheredMultiLinear(GatheredLayer):
    """`MultiLinear` or `QuantizedMultiLinear` with an adapter for each row.

    Each group of rows with one adapter calls that adapter's `DoRAMultiLinear`.

    Attributes:
        linear: The frozen base.
    """

    base_name: ClassVar[str] = "linear"
    linear: "MultiLinear | QuantizedMultiLinear"

    def __call__(self, x: mx.array, transpose: bool = True) -> mx.array:
        """Multiply by every head's matrix or its transpose.

        Args:
            x: Input, shape ``(rows, heads or 1, tokens, in)``.
            transpose: Multiply by the transposed matrix, as a linear layer does.

        Returns:
            Output, shape ``(rows, heads, tokens, out)``.
        """
        plan = self.rows.plan
        if self.is_plain(plan):
            return self.linear(x, transpose=transpose)
        # The length is the number of heads times tokens; only whole rows matter here.
        self.rows.rows_of(x.shape[0], self.path)
        outputs = [
            self.adapters.get(key, self.linear)(x[rows], transpose=transpose)
            for key, rows in plan.groups
        ]
        return mx.concatenate(outputs)[plan.inverse]
