"""A linear layer whose update and gain have a parametrization other than DoRA's."""

from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn

from mlx_dora.errors import DoRAError
from mlx_dora.kernels.rescale import rescale
from mlx_dora.layers._layer import DoRALayer, Kind
from mlx_dora.layers.linear import DoRALinear, project
from mlx_dora.matrix.low_rank import Adapted, LowRank
from mlx_dora.matrix.terms import exact_terms, row_gain
from mlx_dora.matrix.weight import weight_of


class Parametrisation(Kind):
    r"""How a variant uses the parameters of its `VariantLinear`.

    .. math:: y = g \circ (W_0 x + s\,B(Ax)) + b

    A parametrization defines A, B and g, the initial values, and the equivalent plain
    DoRA adapter. The layer holds the arrays.

    Attributes:
        has_norm: Whether the layer divides by a norm that is a constant in the
            backward pass.
    """

    cached = ()
    has_norm: ClassVar[bool] = True

    def start(self, layer: "VariantLinear", r: int) -> None:
        """Initialize the parameters, from a random A, B = 0 and m = ‖W0‖.

        Args:
            layer: The layer, with a base and factors of rank `room` times `r`.
            r: The requested rank.
        """

    def factors(self, layer: "VariantLinear") -> tuple[mx.array, mx.array]:
        """Return A ``(in, r)`` and B ``(r, out)``."""
        return layer["lora_a"], layer["lora_b"]

    def gain(self, layer: "VariantLinear") -> mx.array:
        """Return the gain of each row. Shape ``(out,)`` or ``()``, float32."""
        return row_gain(layer["m"], layer.norm())

    def output(self, layer: "VariantLinear", x: mx.array, y: mx.array) -> mx.array:
        """Return the output for input `x` and base output `y`, W0·x + b."""
        if self.cached and (rest := layer.epilogue(x.dtype)) is not None:
            return rest.apply(y, x)
        a, b = self.factors(layer)
        g = self.gain(layer)
        h = layer.dropout(x) @ a.astype(x.dtype)
        up = b.astype(mx.float32)
        return rescale(y, h, up, g, layer.bias_offset(g), layer.scale)

    def export(self, layer: "VariantLinear") -> tuple[mx.array, mx.array, mx.array]:
        """Return A, B and m of the equivalent plain DoRA adapter, with the same scale.

        Raises:
            DoRAError: If no DoRA adapter is equivalent.
        """
        return *self.factors(layer), layer["m"]

    @classmethod
    def adapt(
        cls, module: Any, r: int = 8, dropout: float = 0.0, scale: float = 20.0
    ) -> "VariantLinear":
        """Wrap a linear layer with this parametrization.

        Args:
            module: The base, kept unchanged as ``linear``.
            r: Rank of the update.
            dropout: Dropout probability in the low-rank branch.
            scale: Multiplier s of the update.

        Raises:
            DoRAError: If `module` is not exactly a linear layer, dense or packed.
        """
        layer = VariantLinear.__new__(VariantLinear)
        nn.Module.__init__(layer)
        layer.kind = kind = cls()
        layer._adapt(module, kind.room * r, dropout, scale)
        kind.start(layer, r)
        if kind.fixed:
            layer.freeze(keys=list(kind.fixed), recurse=False)
        return layer


class VariantLinear(DoRALayer):
    """A linear layer trained with a `Parametrisation`.

    Attributes:
        linear: The frozen base.
        kind: The parametrization.
        enabled: If False, the layer computes the output of its base.
    """

    base_name: ClassVar[str] = "linear"
    linear: nn.Linear | nn.QuantizedLinear

    @classmethod
    def base_types(cls) -> tuple[type[nn.Module], ...]:
        """Return the classes of modules that this layer can wrap."""
        return DoRALinear.base_types()

    def factors(self) -> tuple[mx.array, mx.array]:
        """Return A ``(in, r)`` and B ``(r, out)`` of the parametrization."""
        return self.kind.factors(self)

    def adapted(self) -> Adapted:
        """Return the equivalent plain DoRA adapter: A, B, s and m.

        Raises:
            DoRAError: If no DoRA adapter is equivalent.
        """
        lora_a, lora_b, m = self.kind.export(self)
        update = LowRank(lora_a=lora_a, lora_b=lora_b, scale=self.scale)
        return Adapted(update=update, m=m)

    def set_base(self, base: nn.Module) -> None:
        """Always raises: the initial values of a variant depend on its base.

        Raises:
            DoRAError: Always. Use `Parametrisation.adapt` for another base.
        """
        raise DoRAError(
            f"a {self.kind.name} layer cannot take another base; adapt that base "
            "instead."
        )

    def hold_norm(self) -> None:
        """Hold the norm, if the parametrization has a constant norm."""
        if self.kind.has_norm:
            super().hold_norm()

    def __call__(self, x: mx.array) -> mx.array:
        """Return the adapted output for `x`."""
        if not self.enabled:
            return self.linear(x)
        return self.kind.output(self, x, project(self.linear, x))

    def export(self) -> DoRALinear:
        """Return an equivalent plain DoRA layer over the same base.

        Raises:
            DoRAError: If no DoRA adapter is equivalent.
        """
        layer = DoRALinear.from_parts(
            self.linear,
            self.adapted(),
            dropout=self.dropout,
            squared_base=self["_squared_base"],
        )
        layer.enabled = self.enabled
        layer.train(self.training)
        return layer


def exact_norm(layer: VariantLinear, lora_a: mx.array, lora_b: mx.array) -> mx.array:
    """Return ‖W0 + s·BA‖ of each row in float32; rows that cancel are computed densely.

    The exported layer divides by this norm in eval mode. Shape ``(out,)``.
    """
    update = LowRank(lora_a=lora_a, lora_b=lora_b, scale=layer.scale)
    return exact_terms(weight_of(layer.linear), update).norm


def rescaled_base(
    layer: VariantLinear, x: mx.array, y: mx.array, up: mx.array | None = None
) -> mx.array:
    """Return ``g∘(W0·x) + h·up + b``, where g does not scale the update.

    Args:
        layer: The layer, whose parametrization defines g.
        x: Input, shape ``(..., in)``.
        y: Output of the base, W0·x + b. Shape ``(..., out)``.
        up: Scaled up projection, shape ``(r, out)``, float32; None for no update.

    Returns:
        Output, rounded once from float32 to the dtype of `y`.
    """
    gain = layer.kind.gain(layer)
    out = gain * y.astype(mx.float32)
    if up is not None:
        h = layer.dropout(x) @ layer.lora_a.astype(x.dtype)
        out = out + h.astype(mx.float32) @ up
    if (offset := layer.bias_offset(gain)) is not None:
        out = out + offset
    return out.astype(y.dtype)
