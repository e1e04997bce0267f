"""What layers over a stack of matrices share: experts, or heads of latent attention."""

import math
from typing import ClassVar, cast

import mlx.core as mx
import mlx.nn as nn

from mlx_dora.factored import Update, stack_norms
from mlx_dora.kernels import QuantizedWeight
from mlx_dora.kernels.reference import factored_norm, row_gain, update_terms
from mlx_dora.kernels.rows import matrices, row_squares
from mlx_dora.layers._base import weight_of
from mlx_dora.layers._fuse import fused_module
from mlx_dora.layers._layer import DoRALayer


class StackLayer(DoRALayer):
    """Common part of `DoRASwitchLinear` and `DoRAMultiLinear`; not used by itself.

    One adapter a matrix of the stack, all of one rank, laid out as in mlx-lm's
    `LoRASwitchLinear`: ``lora_a`` ``(n, r, in)``, ``lora_b`` ``(n, out, r)``; and ``m``
    ``(n, out)``; float32. Norms come from the factored terms, batched: no array of the
    weight's size is made, a packed weight is not unpacked as a whole.
    """

    base_name: ClassVar[str] = "linear"

    def adapt(self, base: nn.Module, r: int, dropout: float, scale: float) -> None:
        """Take a base and start from it: a random A, B = 0 and m = ‖W0‖."""
        self.check_base(base)
        count, out, width = weight_of(base).shape
        self.dropout = nn.Dropout(p=dropout)
        self.scale = scale
        self.enabled = True
        bound = 1 / math.sqrt(width)
        self.lora_a = mx.random.uniform(low=-bound, high=bound, shape=(count, r, width))
        self.lora_b = mx.zeros((count, out, r))
        self.set_base(base)

    def factors(self) -> tuple[mx.array, mx.array]:
        """A ``(n, in, r)`` and B ``(n, r, out)``."""
        return self["lora_a"].swapaxes(-1, -2), self["lora_b"].swapaxes(-1, -2)

    def norm(self) -> mx.array:
        """Norm of every adapted row, without a gradient. ``(n, out)`` float32."""
        if "_norm" in self:
            return self["_norm"]
        down, up = (mx.stop_gradient(one.astype(mx.float32)) for one in self.factors())
        weight = weight_of(self.base)
        if isinstance(weight, QuantizedWeight):
            product = weight.packed_matmul(down.swapaxes(-1, -2)).swapaxes(-1, -2)
        else:
            product = weight @ down.astype(weight.dtype)
        terms = mx.vmap(update_terms)(product.astype(mx.float32), down, up)
        norm = factored_norm(self["_squared_base"], *terms, self.scale)
        return mx.stop_gradient(norm)

    def gain(self) -> mx.array:
        """Factor m/‖W0 + s·BA‖ of each row, kept in eval mode. ``(n, out)`` float32."""
        if self.training:
            return row_gain(self["m"], self.norm())
        names = ("m", "lora_a", "lora_b")
        sources = [*(self[name] for name in names), self.base["weight"]]
        kept, gain = self.get("_gain", ((), None))
        if gain is None or any(a is not b for a, b in zip(kept, sources, strict=True)):
            try:
                mx.eval(sources)
            except ValueError:  # traced, as in `fold`
                return row_gain(self["m"], self.norm())
            norm = self.get("_known_norm")
            if norm is None:
                down, up = self.factors()
                update = Update(lora_a=down, lora_b=up, scale=self.scale)
                norm = stack_norms(weight_of(self.base), update, self["_squared_base"])
            gain = row_gain(self["m"], mx.stop_gradient(norm))
            mx.eval(gain)
            self._gain = (sources, gain)
        return cast(mx.array, gain)

    def invalidate(self) -> None:
        """Forget what eval mode has cached, after writing into a parameter's array."""
        super().invalidate()
        self.pop("_gain", None)

    def fuse(self, dequantize: bool = False) -> nn.Module:
        """The adapted stack as a plain one, matrix after matrix.

        Args:
            dequantize: Return a dense module for a packed base too.

        Returns:
            A module of the base's class (dense if `dequantize`), in its dtype.
        """
        return fused_module(self, dequantize)

    def _base_squares(self) -> mx.array:
        squares = []
        for one in matrices(weight_of(self.base)):
            squares.append(row_squares(one))
            mx.eval(squares[-1])
        return mx.stack(squares)
