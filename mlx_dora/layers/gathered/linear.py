"""Linear layers with an adapter for each row of the batch."""

from typing import ClassVar

import mlx.core as mx
import mlx.nn as nn

from mlx_dora.layers.gathered.layer import GatheredLayer
from mlx_dora.layers.gathered.projection import adapted
from mlx_dora.layers.linear import project


class GatheredLinear(GatheredLayer):
    """`nn.Linear` or `nn.QuantizedLinear` with an adapter for each row.

    Input ``(rows, ..., in)``; output ``(rows, ..., out)`` in the dtype of the input.

    Attributes:
        linear: The frozen base.
    """

    base_name: ClassVar[str] = "linear"
    linear: nn.Linear | nn.QuantizedLinear

    def __call__(self, x: mx.array) -> mx.array:
        """Return each row's adapted output."""
        # On a CPU, products of matrices are faster than those of stacks of rows.
        flat = x.reshape(-1, x.shape[-1])
        y = adapted(self, project(self.linear, flat), flat)
        return y.reshape(*x.shape[:-1], -1)
