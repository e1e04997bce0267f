"""DoRA for `nn.Embedding` and `nn.QuantizedEmbedding`, tied heads included."""

from typing import ClassVar

import mlx.core as mx
import mlx.nn as nn

from mlx_dora.kernels import dora_scale
from mlx_dora.kernels.reference import factored_norm, row_gain, update_terms
from mlx_dora.layers._base import project
from mlx_dora.layers._fuse import fused_module
from mlx_dora.layers._layer import DoRALayer


class DoRAEmbedding(DoRALayer):
    r"""An embedding with one trained magnitude per token and a low-rank direction.

    .. math:: e_t = m_t \, \frac{E_t + s\,(AB)_t}{\lVert E_t + s\,(AB)_t \rVert}

    Eq. 5 of DoRA (arXiv:2402.09353) on the rows of E, as mlx-lm takes it: the magnitude
    has length ``num_embeddings``. Only the rows looked up are normalised. `as_linear`
    projects with the adapted matrix, for models that tie their head.

    Parameters: ``lora_a`` ``(num_embeddings, r)``, ``lora_b`` ``(r, dims)`` and ``m``
    ``(num_embeddings,)``, float32. Output in the dtype of the base's output (lookup) or
    of the input (`as_linear`). Eval-mode cache as in `DoRALinear`.

    Attributes:
        embedding: The frozen base.
        enabled: False makes the layer its base, m included.

    Args:
        num_embeddings: Rows of the embedding.
        dims: Its width.
        r: Rank of the update.
        dropout: Probability of dropping an element of the low-rank branch.
        scale: Multiplier s of the update.
    """

    base_name: ClassVar[str] = "embedding"
    lora_a_spans_rows: ClassVar[bool] = True
    _projects: bool = False
    base_types = (nn.Embedding, nn.QuantizedEmbedding)
    embedding: nn.Embedding | nn.QuantizedEmbedding

    def __init__(
        self,
        num_embeddings: int,
        dims: int,
        r: int = 8,
        dropout: float = 0.0,
        scale: float = 20.0,
    ) -> None:
        super().__init__()
        self.adapt(nn.Embedding(num_embeddings, dims), r, dropout, scale)

    def set_embedding(self, embedding: nn.Module) -> None:
        """Take another base and set m to the norms of its rows."""
        self.set_base(embedding)

    def factors(self) -> tuple[mx.array, mx.array]:
        """The factors for E ``(num_embeddings, dims)``: lora_bᵀ, then lora_aᵀ."""
        return self["lora_b"].T, self["lora_a"].T

    def hold_norm(self) -> None:
        """Hold the norms of the whole vocabulary, if the head is tied to it."""
        if self._projects:
            super().hold_norm()

    def __call__(self, x: mx.array) -> mx.array:
        """Adapted rows of the tokens `x`, ``(..., dims)``."""
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
        """Norms of the rows of the tokens `x`, a constant for the gradient."""
        if "_norm" in self:
            return self["_norm"][x]
        b = self.lora_b.astype(mx.float32)
        full, a, b = (mx.stop_gradient(v) for v in (full, a, b))
        r = b.shape[0]
        c, p = update_terms((full @ b.T).reshape(-1, r), b.T, a.reshape(-1, r).T)
        squared_base = self["_squared_base"][x]
        return factored_norm(
            squared_base, c.reshape(x.shape), p.reshape(x.shape), self.scale
        )

    def as_linear(self, x: mx.array) -> mx.array:
        """Project ``(..., dims)`` onto the adapted rows: ``(..., num_embeddings)``."""
        if not self.enabled:
            return self.embedding.as_linear(x)
        self._projects = True
        y = project(self.embedding, x)
        if (folded := self.folded(x.dtype)) is not None:
            return folded.apply(y, x)
        down, up = self.factors()
        h = self.dropout(x) @ down.astype(x.dtype)
        return dora_scale(y, h, up, self.scale, self.m, self.norm())

    def fuse(self, dequantize: bool = False) -> nn.Embedding | nn.QuantizedEmbedding:
        """The adapted embedding as a plain one.

        Args:
            dequantize: Return an `nn.Embedding` for a packed base too.

        Returns:
            An `nn.Embedding` in the base's dtype, or an `nn.QuantizedEmbedding`.
        """
        return fused_module(self, dequantize)
