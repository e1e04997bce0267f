"""DoRA for `nn.Linear` and `nn.QuantizedLinear`."""

from typing import ClassVar, Self

import mlx.core as mx
import mlx.nn as nn

from mlx_dora.kernels.dispatch import chosen_mode
from mlx_dora.kernels.plain import product_and_norm
from mlx_dora.kernels.rescale import rescale
from mlx_dora.layers._layer import DoRALayer
from mlx_dora.layers.sharded import ShardedLinear
from mlx_dora.matrix.low_rank import Adapted
from mlx_dora.matrix.packed import unpacks
from mlx_dora.matrix.riding import rides
from mlx_dora.matrix.terms import trained_gain
from mlx_dora.matrix.weight import as_packed, weight_from, weight_of

_PACKED = (nn.QuantizedLinear, nn.QuantizedEmbedding)


def project(base: nn.Module, x: mx.array) -> mx.array:
    """Apply the base's linear map and bias, in the dtype of `x`.

    This uses the base's own op, so that an untrained adapter changes no bit, except
    where a packed weight is slow on the CPU (`QuantizedWeight.matmul`).
    """
    packed = as_packed(weight_of(base)) if isinstance(base, _PACKED) else None
    if packed is not None and unpacks(x, packed.shape):
        y = packed.matmul(x)
        y = y + base["bias"] if "bias" in base else y
    elif isinstance(base, nn.Embedding | nn.QuantizedEmbedding):
        y = base.as_linear(x)
    else:
        y = base(x)
    return y if y.dtype == x.dtype else y.astype(x.dtype)


def project_with_norm(layer: DoRALayer, x: mx.array) -> tuple[mx.array, mx.array]:
    """Return the output of the base, `project`, and the norm of the adapted rows.

    Where no kernel may run and one product with the base weight gives both faster
    (`rides`), the output differs from the base's by rounding.
    """
    base = layer[layer.base_name]
    if "_norm" in layer or not rides(base, x) or chosen_mode() != "reference":
        return project(base, x), layer.norm()
    weight, squared = weight_from(base, base), layer["_squared_base"]
    y, n = product_and_norm(x, weight, *layer.factors(), layer.scale, squared)
    return (y + base["bias"] if "bias" in base else y), layer.keep_norm(n)


class DoRALinear(DoRALayer):
    r"""A linear layer with a trained magnitude and a low-rank update.

    .. math:: y = m \circ \frac{W_0 x + s\,B(A x)}{\lVert W_0 + s\,BA \rVert} + b

    This is Eq. 5 of DoRA (arXiv:2402.09353), with one norm per output row, which is a
    constant in the backward pass (section 4.3). Initially m = ‖W0‖ and B = 0, and the
    output equals the base's bit for bit (on a CPU, training may round large products
    differently; see `project_with_norm`). A zero row of W0 has no direction and stays
    zero. A magnitude that becomes 0 stays 0.

    Parameters: ``lora_a`` ``(input_dims, r)``, ``lora_b`` ``(r, output_dims)`` and
    ``m`` ``(output_dims,)``, float32. Input ``(..., input_dims)``; output
    ``(..., output_dims)`` in the input's dtype. The low-rank product x·A uses the
    input's dtype. Norms and the gain m/‖·‖ are float32, and the result is rounded once.

    In eval mode, everything that does not depend on the input is cached. Assignments
    (``layer.m *= 2``) and ``model.update(...)`` clear the cache. After writing into an
    array (``layer.m[0] = 1``), call `invalidate`.

    Attributes:
        linear: The frozen base.
        enabled: If False, the layer computes the output of its base.

    Args:
        input_dims: Width of the input.
        output_dims: Width of the output.
        r: Rank of the update.
        dropout: Dropout probability for inputs of the low-rank branch.
        scale: Multiplier s of the update.
        bias: Whether the base has a bias.
    """

    base_name: ClassVar[str] = "linear"
    linear: nn.Linear | nn.QuantizedLinear | ShardedLinear

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
        self._adapt(nn.Linear(input_dims, output_dims, bias=bias), r, dropout, scale)

    @classmethod
    def base_types(cls) -> tuple[type[nn.Module], ...]:
        """Return the classes of modules that this layer can wrap."""
        return nn.Linear, nn.QuantizedLinear, ShardedLinear

    @classmethod
    def from_parts(
        cls,
        linear: nn.Linear | nn.QuantizedLinear,
        adapted: Adapted,
        *,
        dropout: nn.Dropout | None = None,
        squared_base: mx.array | None = None,
    ) -> Self:
        """Wrap a linear layer with a given adapter.

        Args:
            linear: The base, kept unchanged.
            adapted: The adapter: A ``(in, r)``, B ``(r, out)``, s and m ``(out,)``.
            dropout: Dropout in the low-rank branch; None for no dropout.
            squared_base: ‖W0‖² of each row, if known. Shape ``(out,)``, float32.

        Raises:
            DoRAError: If `linear` is of another class, or the shapes do not fit.
        """
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.check_base(linear)
        layer.linear = linear
        layer._measure_base(squared_base)
        update = adapted.update
        update.check_fits(weight_of(linear).shape)
        layer.dropout = nn.Dropout(p=0.0) if dropout is None else dropout
        layer.scale = update.scale
        layer.enabled = True
        layer.lora_a, layer.lora_b = update.lora_a, update.lora_b
        layer.m = mx.sqrt(layer["_squared_base"]) if adapted.m is None else adapted.m
        mx.eval(layer.lora_a, layer.lora_b, layer.m)
        return layer

    set_linear = DoRALayer.set_base

    def __call__(self, x: mx.array) -> mx.array:
        """Return the adapted output for `x`, Eq. 5."""
        if not self.enabled:
            return self.linear(x)
        if not self.training and (rest := self.epilogue(x.dtype)) is not None:
            return rest.apply(project(self.linear, x), x)
        y, n = project_with_norm(self, x)  # W0·x + b, ‖W0 + s·BA‖
        g = trained_gain(self.m, n)
        h = self.dropout(x) @ self.lora_a.astype(x.dtype)
        up = self.lora_b.astype(mx.float32)
        # g∘(W0·x + b + s·B(Ax)) + (1 − g)∘b
        if (shared := self._shared) is not None:
            arguments = y, h, up, g, self.bias_offset(g), self.scale
            return shared.rescale(self, x, *arguments)
        return rescale(y, h, up, g, self.bias_offset(g), self.scale)
