"""DoRA for `nn.Linear` and `nn.QuantizedLinear`."""

from typing import ClassVar

import mlx.core as mx
import mlx.nn as nn

from mlx_dora.kernels import dora_scale
from mlx_dora.kernels.reference import row_gain
from mlx_dora.layers._base import project
from mlx_dora.layers._fuse import fused_module
from mlx_dora.layers._layer import DoRALayer


class DoRALinear(DoRALayer):
    r"""A linear layer whose magnitude and low-rank direction are trained.

    .. math:: y = m \circ \frac{W_0 x + s\,B(A x)}{\lVert W_0 + s\,BA \rVert} + b

    Eq. 5 of DoRA (arXiv:2402.09353), the norm a constant in the backward pass
    (section 4.3), one norm per output row. At the start m = ‖W0‖ and B = 0, and the
    layer equals its base bit for bit. A row of W0 that is zero has no direction and
    stays zero; a magnitude that reaches 0 is frozen there.

    Parameters: ``lora_a`` ``(input_dims, r)``, ``lora_b`` ``(r, output_dims)`` and
    ``m`` ``(output_dims,)``, float32. Input ``(..., input_dims)``; output
    ``(..., output_dims)`` in the input's dtype. The low-rank product x·A runs in the
    input's dtype; norms and the scale m/‖·‖ are float32, the result is rounded once.

    In eval mode what does not depend on the input is cached. Assigning
    (``layer.m *= 2``) and ``model.update(...)`` are noticed; after writing into an
    array (``layer.m[0] = 1``) call `invalidate`.

    Attributes:
        linear: The frozen base.
        enabled: False makes the layer its base, m included.

    Args:
        input_dims: Width of the input.
        output_dims: Width of the output.
        r: Rank of the update.
        dropout: Probability of dropping an input of the low-rank branch.
        scale: Multiplier s of the update.
        bias: Whether the base has a bias.
    """

    base_name: ClassVar[str] = "linear"
    base_types = (nn.Linear, nn.QuantizedLinear)
    linear: nn.Linear | nn.QuantizedLinear

    def __init__(
        self,
        input_dims: int,
        output_dims: int,
        r: int = 8,
        dropout: float = 0.0,
        scale: float = 20.0,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.adapt(nn.Linear(input_dims, output_dims, bias=bias), r, dropout, scale)

    def set_linear(self, linear: nn.Module) -> None:
        """Take another base and set m to the norms of its rows."""
        self.set_base(linear)

    def factors(self) -> tuple[mx.array, mx.array]:
        """A ``(in, r)`` and B ``(r, out)``."""
        return self["lora_a"], self["lora_b"]

    def __call__(self, x: mx.array) -> mx.array:
        """Adapted output for `x`, as the class says."""
        linear = self.linear
        if not self.enabled:
            return linear(x)
        return self.adapted(x, project(linear, x))

    def adapted(self, x: mx.array, y: mx.array) -> mx.array:
        """The output for input `x`, given the base's, W0x + b."""
        if (folded := self.folded(x.dtype)) is not None:
            return folded.apply(y, x)
        norm = self.norm()
        down, up = self.factors()
        h = self.dropout(x) @ down.astype(x.dtype)
        offset = self.offset(row_gain(self.m, norm))
        return dora_scale(y, h, up, self.scale, self.m, norm, offset)

    def offset(self, gain: mx.array) -> mx.array | None:
        """(1 − g)·b: `y` holds b already, and g∘y has g∘b in it; None without bias."""
        if "bias" not in self.linear:
            return None
        return (1 - gain) * self.linear.bias.astype(mx.float32)

    def fuse(self, dequantize: bool = False) -> nn.Linear | nn.QuantizedLinear:
        """The adapted layer as a plain one.

        Args:
            dequantize: Return an `nn.Linear` for a packed base too. Packing again
                loses most of a small update (`mlx_dora.fuse_dora` reports how much).

        Returns:
            An `nn.Linear` in the base's dtype, or an `nn.QuantizedLinear`.
        """
        return fused_module(self, dequantize)
