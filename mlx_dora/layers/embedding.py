"""DoRA for `nn.Embedding` and `nn.QuantizedEmbedding`, including tied heads."""

from typing import ClassVar

import mlx.core as mx
import mlx.nn as nn

from mlx_dora.kernels.rescale import rescale
from mlx_dora.layers._layer import DoRALayer
from mlx_dora.layers.linear import project, project_with_norm
from mlx_dora.layers.sharded import ShardedEmbedding
from mlx_dora.matrix.low_rank import LowRank
from mlx_dora.matrix.terms import floored_norm, row_gain, terms_of, trained_gain


class DoRAEmbedding(DoRALayer):
    r"""An embedding with a trained magnitude per token and a low-rank update.

    .. math:: e_t = m_t \, \frac{E_t + s\,(AB)_t}{\lVert E_t + s\,(AB)_t \rVert}

    This is Eq. 5 of DoRA (arXiv:2402.09353) on the rows of E, as in mlx-lm: the
    magnitude has length ``num_embeddings``. Only the rows looked up are normalized.
    `as_linear` projects with the adapted matrix, for models with a tied head.

    Parameters: ``lora_a`` ``(num_embeddings, r)``, ``lora_b`` ``(r, dims)`` and ``m``
    ``(num_embeddings,)``, float32. Output in the dtype of the base's output (lookup) or
    of the input (`as_linear`). The eval-mode cache works as in
    `DoRALinear`.

    Attributes:
        embedding: The frozen base.
        enabled: If False, the layer computes the output of its base.

    Args:
        num_embeddings: Number of rows of the embedding.
        dims: Width of the embedding.
        r: Rank of the update.
        dropout: Probability of dropping an element of the low-rank branch.
        scale: Multiplier s of the update.
    """

    base_name: ClassVar[str] = "embedding"
    layout = "embedding"
    embedding: nn.Embedding | nn.QuantizedEmbedding | ShardedEmbedding

    def __init__(
        self,
        num_embeddings: int,
        dims: int,
        r: int = 8,
        dropout: float = 0.0,
        scale: float = 20.0,
    ) -> None:
        super().__init__()
        self._adapt(nn.Embedding(num_embeddings, dims), r, dropout, scale)

    @classmethod
    def base_types(cls) -> tuple[type[nn.Module], ...]:
        """Return the classes of modules that this layer can wrap."""
        return nn.Embedding, nn.QuantizedEmbedding, ShardedEmbedding

    set_embedding = DoRALayer.set_base

    def __call__(self, x: mx.array) -> mx.array:
        """Return the adapted rows of the tokens `x`, shape ``(..., dims)``."""
        y = self.embedding(x)
        if not self.enabled:
            return y
        full = y.astype(mx.float32)
        a = self.lora_a[x].astype(mx.float32)  # (..., r)
        update = self.scale * (a @ self.lora_b.astype(mx.float32))
        gain = row_gain(self.m[x], self._lookup_norm(x, full, a))
        out = gain[..., None] * (full + self.dropout(update))
        return out.astype(y.dtype)

    def _lookup_norm(self, x: mx.array, full: mx.array, a: mx.array) -> mx.array:
        """Return the norms of the rows of the tokens `x`, constant in the gradient."""
        if "_norm" in self:
            return self["_norm"][x]
        full, a = (mx.stop_gradient(v.reshape(-1, v.shape[-1])) for v in (full, a))
        lora_a = mx.stop_gradient(self.lora_b.astype(mx.float32)).T  # (dims, r)
        update = LowRank(lora_a=lora_a, lora_b=a.T, scale=self.scale)
        q0 = self["_squared_base"][x].reshape(-1)
        return floored_norm(terms_of(q0, full @ lora_a, update)).reshape(x.shape)

    def as_linear(self, x: mx.array) -> mx.array:
        """Project ``(..., dims)`` onto the adapted rows: ``(..., num_embeddings)``."""
        if not self.enabled:
            return self.embedding.as_linear(x)
        if not self.training and (rest := self.epilogue(x.dtype)) is not None:
            return rest.apply(project(self.embedding, x), x)
        y, n = project_with_norm(self, x)  # E·x, ‖E + s·AB‖
        g = trained_gain(self.m, n)
        a, b = self.factors()
        h = self.dropout(x) @ a.astype(x.dtype)
        return rescale(y, h, b.astype(mx.float32), g, None, self.scale)
