"""Weight normalization, on which DoRA's decomposition is based."""

import mlx.core as mx
import mlx.nn as nn

from mlx_dora.decomposition import dora_decompose
from mlx_dora.errors import DoRAError


class WeightNormLinear(nn.Module):
    r"""A linear layer that trains the length and the full direction of each row.

    .. math:: y = g \circ \frac{V x}{\lVert V \rVert} + b

    Salimans & Kingma 2016 (arXiv:1602.07868), with gradients through the norm. It is
    for comparison only: it has no frozen base and cannot be exported to an adapter.

    Parameters: ``v`` ``(out, in)``, ``g`` ``(out,)`` and optionally ``bias``.

    Args:
        input_dims: Width of the input.
        output_dims: Width of the output.
        bias: Whether the layer has a bias.
    """

    def __init__(self, input_dims: int, output_dims: int, bias: bool = True) -> None:
        super().__init__()
        self._take(nn.Linear(input_dims, output_dims, bias=bias))

    @classmethod
    def from_base(cls, linear: nn.Linear) -> "WeightNormLinear":
        """Initialize from a linear layer's weight: g = ‖W‖, V = W.

        Raises:
            DoRAError: If `linear` is not exactly an `nn.Linear`, for example packed.
        """
        if type(linear) is not nn.Linear:
            raise DoRAError(
                "weight normalization trains the weight of an nn.Linear, got a "
                f"{type(linear).__name__}."
            )
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._take(linear)
        return layer

    def _take(self, linear: nn.Linear) -> None:
        self.v = linear.weight
        self.g, _ = dora_decompose(linear.weight)
        if "bias" in linear:
            self.bias = linear.bias

    def weight(self) -> mx.array:
        """Return g∘V/‖V‖ in V's dtype, shape ``(out, in)``; zero rows stay zero."""
        full = self.v.astype(mx.float32)
        squared = mx.square(full).sum(axis=1)  # over a row: one norm per output
        lives = squared > 0
        gain = mx.where(lives, self.g * mx.rsqrt(mx.where(lives, squared, 1.0)), 0.0)
        return (gain[:, None] * full).astype(self.v.dtype)

    def __call__(self, x: mx.array) -> mx.array:
        """Return the output ``(..., out)`` for `x` ``(..., in)``."""
        y = x @ self.weight().T
        return y + self.bias if "bias" in self else y

    def fuse(self) -> nn.Linear:
        """Convert to a plain linear layer."""
        weight = self.weight()
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias="bias" in self)
        linear.weight = weight
        if "bias" in self:
            linear.bias = self.bias
        return linear
