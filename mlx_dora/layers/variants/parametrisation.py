"""A linear layer whose update and gain have a parametrization other than DoRA's."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn

from mlx_dora.errors import DoRAError
from mlx_dora.kernels.rescale import rescale
from mlx_dora.layers._layer import DoRALayer
from mlx_dora.layers.linear import DoRALinear, project
from mlx_dora.matrix.low_rank import Adapted, LowRank
from mlx_dora.matrix.terms import exact_terms, row_gain
from mlx_dora.matrix.weight import weight_of


class Parametrisation(ABC):
    r"""How a variant uses the parameters of its `VariantLinear`.

    .. math:: y = g \circ (W_0 x + s\,B(Ax)) + b

    A parametrization defines A, B and g, the initial values, and the equivalent plain
    DoRA adapter. The layer holds the arrays.

    Attributes:
        name: Value of `DoRAConfig.variant` (or ``init``).
        fixed: Names of parameters that are kept but not trained.
        cached: Names of the parameters that eval-mode constants are computed from;
            empty if nothing is cached.
        has_norm: Whether the layer divides by a norm that is a constant in the
            backward pass.
        room: Ratio of the width of the factors to the requested rank.
    """

    name: ClassVar[str]
    fixed: ClassVar[tuple[str, ...]] = ()
    cached: ClassVar[tuple[str, ...]] = ()
    has_norm: ClassVar[bool] = True
    room: int = 1

    def start(self, layer: "VariantLinear", r: int) -> None:  # noqa: B027 - optional
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
        up = layer.scale * b.astype(mx.float32)
        return rescale(y, h, up, g, layer.bias_offset(g))

    @abstractmethod
    def export(self, layer: "VariantLinear") -> tuple[mx.array, mx.array, mx.array]:
        """Return A, B and m of the equivalent plain DoRA adapter, with the same scale.

        Raises:
            DoRAError: If no DoRA adapter is equivalent.
        """

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
    base_types = DoRALinear.base_types
    linear: nn.Linear | nn.QuantizedLinear
    kind: Any  # a Parametrisation; a variant's own code knows which

    @property
    def variant(self) -> str:
        """Name of the layer's parametrisation."""
        return self.kind.name

    @property
    def room(self) -> int:
        """Ratio of the width of the factors to the requested rank."""
        return self.kind.room

    @property
    def fixed(self) -> tuple[str, ...]:
        """Names of parameters that are kept but not trained."""
        return self.kind.fixed

    @property
    def cached(self) -> tuple[str, ...]:
        """Names of the parameters that the eval-mode cache is computed from."""
        return self.kind.cached

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
            f"a {self.variant} layer cannot take another base; adapt that base instead."
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


def scaled_sum(
    y: mx.array,
    gain: mx.array,
    low: mx.array | None = None,
    up: mx.array | None = None,
    offset: mx.array | None = None,
) -> mx.array:
    """Return ``gain∘y + low·up + offset``, rounded once from float32 to `y`'s dtype.

    This is the last step of variants whose gain does not scale the low-rank part.

    Args:
        y: Output of the base, shape ``(..., out)``.
        gain: Gain, shape ``(out,)`` or ``()``, float32.
        low: Low-rank activation, shape ``(..., r)``; None for no low-rank part.
        up: Scaled up projection, shape ``(r, out)``, float32; None like `low`.
        offset: Offset, shape ``(out,)``, float32, or None.
    """
    out = gain * y.astype(mx.float32)
    if low is not None and up is not None:
        out = out + low.astype(mx.float32) @ up
    if offset is not None:
        out = out + offset
    return out.astype(y.dtype)
