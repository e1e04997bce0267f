"""A linear layer whose update and gain are parametrised in another way than DoRA's."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn

from mlx_dora.errors import DoRAError
from mlx_dora.kernels.rescale import rescale
from mlx_dora.layers._base import weight_of
from mlx_dora.layers._layer import DoRALayer
from mlx_dora.layers.linear import DoRALinear, project
from mlx_dora.matrix.low_rank import Adapted, LowRank
from mlx_dora.matrix.terms import exact_terms, row_gain


class Parametrisation(ABC):
    r"""What a variant makes of its parameters; they are those of a `VariantLinear`.

    .. math:: y = g \circ (W_0 x + s\,B(Ax)) + b

    A parametrisation says what A, B and g are, how training starts, and which plain
    DoRA adapter computes the same. The arrays are the layer's.

    Attributes:
        name: As `DoRAConfig.variant` (or ``init``) has it.
        fixed: Names of parameters that are kept but not trained.
        cached: Names of the parameters that eval mode's constants are made from; empty
            where nothing is cached.
        room: Width of the factors held, in ranks asked for.
    """

    name: ClassVar[str]
    fixed: ClassVar[tuple[str, ...]] = ()
    cached: ClassVar[tuple[str, ...]] = ()
    has_norm: ClassVar[bool] = True
    room: int = 1

    def start(self, layer: "VariantLinear", r: int) -> None:  # noqa: B027 - optional
        """Set the parameters. A is random, B = 0, m = ‖W0‖ and the base is known.

        Args:
            layer: The layer, with factors of rank `room` times `r`.
            r: The rank asked for.
        """

    def factors(self, layer: "VariantLinear") -> tuple[mx.array, mx.array]:
        """A ``(in, r)`` and B ``(r, out)``."""
        return layer["lora_a"], layer["lora_b"]

    def gain(self, layer: "VariantLinear") -> mx.array:
        """Gain of each row. Shape ``(out,)`` or ``()``, float32."""
        return row_gain(layer["m"], layer.norm())

    def output(self, layer: "VariantLinear", x: mx.array, y: mx.array) -> mx.array:
        """The output for input `x`, given the base's, W0·x + b."""
        if self.cached and (rest := layer.epilogue(x.dtype)) is not None:
            return rest.apply(y, x)
        a, b = self.factors(layer)
        g = self.gain(layer)
        h = layer.dropout(x) @ a.astype(x.dtype)
        up = layer.scale * b.astype(mx.float32)
        return rescale(y, h, up, g, layer.bias_offset(g))

    @abstractmethod
    def export(self, layer: "VariantLinear") -> tuple[mx.array, mx.array, mx.array]:
        """A, B and m of the plain DoRA adapter that computes the same, at its scale.

        Raises:
            DoRAError: If no DoRA adapter can say what the parameters say.
        """

    @classmethod
    def adapt(
        cls, module: Any, r: int = 8, dropout: float = 0.0, scale: float = 20.0
    ) -> "VariantLinear":
        """Put a layer of this parametrisation over a linear layer.

        Args:
            module: The base; kept, unchanged, as ``linear``.
            r: Rank of the update.
            dropout: Probability of dropping in the low-rank branch.
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
    """A linear layer trained under a `Parametrisation`.

    Attributes:
        linear: The frozen base.
        kind: What the parameters mean.
        enabled: False makes the layer its base.
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
        """Width of the factors held, in ranks asked for."""
        return self.kind.room

    @property
    def fixed(self) -> tuple[str, ...]:
        """Names of parameters that are kept but not trained."""
        return self.kind.fixed

    @property
    def cached(self) -> tuple[str, ...]:
        """Names of the parameters that the eval-mode cache is made from."""
        return self.kind.cached

    def factors(self) -> tuple[mx.array, mx.array]:
        """A ``(in, r)`` and B ``(r, out)``, as the parametrisation makes them."""
        return self.kind.factors(self)

    def adapted(self) -> Adapted:
        """The plain DoRA adapter that computes the same: A, B, s and m.

        Raises:
            DoRAError: If no DoRA adapter can say what the parameters say.
        """
        lora_a, lora_b, m = self.kind.export(self)
        update = LowRank(lora_a=lora_a, lora_b=lora_b, scale=self.scale)
        return Adapted(update=update, m=m)

    def set_base(self, base: nn.Module) -> None:
        """Always raises: what a variant starts from follows from its base.

        Raises:
            DoRAError: Use `Parametrisation.adapt` for another base.
        """
        raise DoRAError(
            f"a {self.variant} layer cannot take another base; adapt that base instead."
        )

    def hold_norm(self) -> None:
        """Hold the norm, where the parametrisation has one that is a constant."""
        if self.kind.has_norm:
            super().hold_norm()

    def __call__(self, x: mx.array) -> mx.array:
        """Adapted output for `x`, as the parametrisation says."""
        if not self.enabled:
            return self.linear(x)
        return self.kind.output(self, x, project(self.linear, x))

    def export(self) -> DoRALinear:
        """A plain DoRA layer over the same base that computes the same.

        Raises:
            DoRAError: If no DoRA adapter can say what the parameters say.
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
    """‖W0 + s·BA‖ of each row in float32, cancelling rows from the dense row.

    The norm that the exported layer divides by in eval mode. Shape ``(out,)``.
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
    """``gain∘y + low·up + offset`` in float32, rounded once to the dtype of `y`.

    What the variants end with whose gain does not reach the low-rank part.

    Args:
        y: Output of the base. Shape ``(..., out)``.
        gain: Shape ``(out,)`` or ``()``, float32.
        low: Low-rank activation. Shape ``(..., r)``; None for no such part.
        up: Shape ``(r, out)``, float32.
        offset: Shape ``(out,)`` float32, or None.
    """
    out = gain * y.astype(mx.float32)
    if low is not None and up is not None:
        out = out + low.astype(mx.float32) @ up
    if offset is not None:
        out = out + offset
    return out.astype(y.dtype)
