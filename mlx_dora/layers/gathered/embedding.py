"""Embeddings and tied heads with an adapter for each row of the batch."""

from typing import ClassVar

import mlx.core as mx
import mlx.nn as nn

from mlx_dora.layers.gathered.layer import GatheredLayer
from mlx_dora.layers.gathered.projection import adapted
from mlx_dora.layers.linear import project


class GatheredEmbedding(GatheredLayer):
    """`nn.Embedding` or `nn.QuantizedEmbedding` with an adapter for each row.

    Attributes:
        embedding: The frozen base.
    """

    base_name: ClassVar[str] = "embedding"
    embedding: nn.Embedding | nn.QuantizedEmbedding

    def __call__(self, x: mx.array) -> mx.array:
        """Return the adapted rows of the tokens `x` ``(rows, ...)``."""
        plan = self.rows.plan
        if self.is_plain(plan):
            return self.embedding(x)
        length = self.rows.rows_of(x.size, self.path)
        tokens = x.reshape(-1, length)
        outputs = [
            self.adapters.get(key, self.embedding)(tokens[rows])
            for key, rows in plan.groups
        ]
        y = mx.concatenate(outputs)[plan.inverse]
        return y.reshape(*x.shape, -1)

    def as_linear(self, x: mx.array) -> mx.array:
        """Project ``(rows, ..., dims)`` onto each row's adapted embedding."""
        flat = x.reshape(-1, x.shape[-1])
        y = adapted(self, project(self.embedding, flat), flat)
        return y.reshape(*x.shape[:-1], -1)
