"""What every DoRA layer does with its base, its norms and its eval-mode cache."""

import math
from typing import Any, ClassVar, Self

import mlx.core as mx
import mlx.nn as nn

from mlx_dora.errors import DoRAError
from mlx_dora.factored import AdaptedMatrix, Update
from mlx_dora.kernels import adapted_norm
from mlx_dora.kernels.rows import row_squares
from mlx_dora.layers._base import weight_of
from mlx_dora.layers._folded import Folded, fold


def unsupported(module: nn.Module, known: tuple[type[nn.Module], ...]) -> DoRAError:
    """The error for a module of a class that cannot be adapted."""
    names = ", ".join(cls.__name__ for cls in known)
    return DoRAError(
        f"{type(module).__module__}.{type(module).__name__} cannot take DoRA; "
        f"supported are exactly {names} (a subclass may compute something else)."
    )


class _ReadDirectly(DoRAError, AttributeError):
    """For ``hasattr`` too, the layer has no such attribute."""


class DoRALayer(nn.Module):
    """Common part of `DoRALinear` and `DoRAEmbedding`; not used by itself.

    A subclass names the attribute that holds the frozen base and says which of its
    parameters is the factor on the input's side and which on the output's.
    """

    base_name: ClassVar[str]
    base_types: ClassVar[tuple[type[nn.Module], ...]]
    lora_a_spans_rows: ClassVar[bool] = False  # an embedding's has a row a token
    room: int = 1  # width of the factors held, in ranks asked for
    fixed: ClassVar[tuple[str, ...]] = ()  # parameters that are kept but not trained
    cached: ClassVar[tuple[str, ...]] = ("m", "lora_a", "lora_b")  # by eval mode
    path: str = ""  # where it is in a model, for messages
    dropout: nn.Dropout
    scale: float
    enabled: bool
    lora_a: mx.array
    lora_b: mx.array
    m: mx.array
    _folded: Folded | None
    _measured: mx.array

    @classmethod
    def from_base(
        cls, module: Any, r: int = 8, dropout: float = 0.0, scale: float = 20.0
    ) -> Self:
        """Wrap a module; it is kept, unchanged, under its name in the class.

        Args:
            module: A module of one of the classes that the layer adapts.
            r: Rank of the update.
            dropout: Probability of dropping in the low-rank branch.
            scale: Multiplier s of the update.

        Raises:
            DoRAError: If `module` is of any other class.
        """
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.adapt(module, r, dropout, scale)
        return layer

    def adapt(self, base: nn.Module, r: int, dropout: float, scale: float) -> None:
        """Take a base and start from it: a random A, B = 0 and m = ‖W0‖."""
        self.check_base(base)
        out, width = weight_of(base).shape
        fan, other = (out, width) if self.lora_a_spans_rows else (width, out)
        self.dropout = nn.Dropout(p=dropout)
        self.scale = scale
        self.enabled = True
        bound = 1 / math.sqrt(fan)  # Kaiming-uniform with a = sqrt(5)
        self.lora_a = mx.random.uniform(low=-bound, high=bound, shape=(fan, r))
        self.lora_b = mx.zeros((r, other))
        self.set_base(base)

    def factors(self) -> tuple[mx.array, mx.array]:
        """The update as A ``(in, r)`` and B ``(r, out)`` for a base ``(out, in)``."""
        raise NotImplementedError

    def matrices(self) -> list[AdaptedMatrix]:
        """The adapter of each matrix of the base, which is one unless it is a stack."""
        down, up = self.factors()
        update = Update(lora_a=down, lora_b=up, scale=self.scale)
        return AdaptedMatrix(update=update, m=self["m"]).matrices()

    def fuse(self, dequantize: bool = False) -> Any:
        """The adapted layer as a plain module of the base's class."""
        raise NotImplementedError

    @property
    def base(self) -> nn.Module:
        """The frozen module this layer wraps."""
        return self[self.base_name]

    @property
    def weight(self) -> mx.array:
        """There is none: code that reads the base's would pass the adapter by."""
        raise _ReadDirectly(
            f"{self.path or type(self).__name__}: the model's own code reads its "
            "weight instead of calling it, so it cannot be adapted; leave it out by "
            "giving keys."
        )

    def set_base(self, base: nn.Module) -> None:
        """Take another base and set m to the norms of its rows.

        Raises:
            DoRAError: If `base` is not exactly of a class this layer adapts: a subclass
                may compute something else.
        """
        self.check_base(base)
        self[self.base_name] = base
        self._measure_base()
        self.start()

    def start(self) -> None:
        """Set the parameters that follow from the base: m = ‖W0‖."""
        self.m = mx.sqrt(self["_squared_base"])

    def export(self) -> "DoRALayer":
        """A plain DoRA layer over the same base that computes the same: this one.

        A variant makes one; see `mlx_dora.layers.variants`.
        """
        return self

    def check_base(self, base: nn.Module) -> None:
        """Refuse a base that is not exactly of a class this layer adapts."""
        if type(base) not in self.base_types:
            raise unsupported(base, self.base_types)

    def take(
        self,
        lora_a: mx.array,
        lora_b: mx.array,
        m: mx.array,
        scale: float,
        norm: mx.array,
    ) -> None:
        """Put another adapter in, of any rank, whose norms are known.

        In eval mode the base weight is then not read for them.

        Args:
            lora_a: In the layer's own shape, as are the next two.
            lora_b: See there.
            m: See there.
            scale: Multiplier s.
            norm: Norms of the adapted rows. Shape ``(out,)``, float32.
        """
        self.lora_a, self.lora_b, self.m, self.scale = lora_a, lora_b, m, scale
        self._known_norm = norm

    def norm(self) -> mx.array:
        """Norm of every adapted row, without a gradient. Shape ``(out,)``, float32."""
        if "_norm" in self:
            return self["_norm"]
        return adapted_norm(
            weight_of(self.base),
            *self.factors(),
            self.scale,
            squared_base=self["_squared_base"],
        )

    def hold_norm(self) -> None:
        """Compute the norm now and use it until `release_norm`."""
        self.release_norm()
        self._norm = self.norm()

    def release_norm(self) -> None:
        """Go back to computing the norm on each call."""
        self.pop("_norm", None)

    def invalidate(self) -> None:
        """Forget what eval mode has cached, after writing into a parameter's array."""
        self._folded = None
        self.pop("_known_norm", None)

    def folded(self, dtype: mx.Dtype) -> Folded | None:
        """The eval-mode cache for activations of `dtype`; None if it cannot serve."""
        if self.training:
            return None
        base = self.base
        bias = base.get("bias")
        sources = (*(self[name] for name in self.cached), base["weight"], bias)
        if self._folded is None or not self._folded.fits(sources, dtype):
            self._folded = fold(
                sources,
                weight_of(base),
                *self.factors(),
                self.scale,
                self["m"],
                bias,
                dtype,
                norm=self.get("_known_norm"),
            )
        return self._folded

    def __setattr__(self, key: str, value: Any) -> None:
        super().__setattr__(key, value)
        # What is cached is not about being enabled.
        if not key.startswith("_") and key != "enabled":
            self.invalidate()

    def _set_training_mode(self, mode: bool) -> None:
        # MLX's hook of train() and eval(): the moment to see a base weight replaced
        # behind our back, as `model.load_weights` does.
        super()._set_training_mode(mode)
        self.invalidate()
        if self._measured is not self.base["weight"]:
            self._measure_base()

    def _base_squares(self) -> mx.array:
        """‖W0‖² of every row, float32."""
        return row_squares(weight_of(self.base))

    def _measure_base(self) -> None:
        squared = self._base_squares()
        mx.eval(squared)  # an unevaluated array cannot be used from another thread
        self._squared_base = squared
        # An attribute of the object, not a parameter: held for its identity alone.
        object.__setattr__(self, "_measured", self.base["weight"])
