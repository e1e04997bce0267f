"""What every DoRA layer does with its base, its norms and its eval-mode cache."""

import math
from typing import Any, ClassVar, Self

import mlx.core as mx
import mlx.nn as nn

from mlx_dora.errors import DoRAError
from mlx_dora.kernels import adapted_norm
from mlx_dora.layers._base import weight_of
from mlx_dora.layers._cache import Epilogue, EvalCache, Sources, is_traced
from mlx_dora.layers._fuse import fused_module
from mlx_dora.layers.layout import LINEAR, Layout
from mlx_dora.matrix.low_rank import Adapted, LowRank
from mlx_dora.matrix.terms import exact_terms, row_gain
from mlx_dora.matrix.weight import matrices, row_squares, weight_from


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
    """Base class of the adapted layers; not used by itself.

    A subclass names the attribute that holds the frozen base, says how its factors are
    laid out, and computes its output. Three things are kept beside the parameters:
    ‖W0‖² of the base, the norms while `hold_norm` lasts, and the eval-mode cache.
    """

    base_name: ClassVar[str]
    base_types: ClassVar[tuple[type[nn.Module], ...]]
    layout: ClassVar[Layout] = LINEAR
    path: str = ""  # where it is in a model, for messages
    dropout: nn.Dropout
    scale: float
    enabled: bool
    lora_a: mx.array
    lora_b: mx.array
    m: mx.array
    _cache: EvalCache | None
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
        layer._adapt(module, r, dropout, scale)
        return layer

    def _adapt(self, base: nn.Module, r: int, dropout: float, scale: float) -> None:
        """Take a base and start from it: a random A, B = 0 and m = ‖W0‖."""
        self.check_base(base)
        shape = tuple(weight_of(base).shape)
        shape_a, shape_b = self.layout.shapes(shape, r)
        # Kaiming-uniform with a = sqrt(5)
        bound = 1 / math.sqrt(shape[self.layout.fan_axis])
        self.dropout = nn.Dropout(p=dropout)
        self.scale = scale
        self.enabled = True
        self.lora_a = mx.random.uniform(low=-bound, high=bound, shape=shape_a)
        self.lora_b = mx.zeros(shape_b)
        self._put_base(base)

    @property
    def base(self) -> nn.Module:
        """The frozen module this layer wraps."""
        return self[self.base_name]

    @property
    def weight(self) -> mx.array:
        """Always raises: reading the base weight directly would bypass the adapter."""
        raise _ReadDirectly(
            f"{self.path or type(self).__name__}: the model's own code reads its "
            "weight instead of calling it, so it cannot be adapted; leave it out by "
            "giving keys."
        )

    @property
    def variant(self) -> str:
        """Name of the layer's parametrisation."""
        return "dora"

    @property
    def room(self) -> int:
        """Width of the factors held, in ranks asked for."""
        return 1

    @property
    def fixed(self) -> tuple[str, ...]:
        """Names of parameters that are kept but not trained."""
        return ()

    @property
    def cached(self) -> tuple[str, ...]:
        """Names of the parameters that the eval-mode cache is made from."""
        return ("m", "lora_a", "lora_b")

    def factors(self) -> tuple[mx.array, mx.array]:
        """The update as A ``(..., in, r)`` and B ``(..., r, out)``."""
        return self.layout.turn(self["lora_a"], self["lora_b"])

    def adapted(self) -> Adapted:
        """The adapter of the base's weight: A, B, s and m."""
        return Adapted(update=self._update(), m=self["m"])

    def _update(self) -> LowRank:
        lora_a, lora_b = self.factors()
        return LowRank(lora_a=lora_a, lora_b=lora_b, scale=self.scale)

    def fuse(self, dequantize: bool = False) -> Any:
        """The adapted layer as a plain module.

        Args:
            dequantize: Return a dense module for a packed base too. Packing again
                loses most of a small update (`mlx_dora.fuse_dora` reports how much).

        Returns:
            A module of the base's class (dense if `dequantize`), in the base's dtype.

        Raises:
            DoRAError: If the adapted weight holds NaN or inf.
        """
        adapted = self.adapted().matrices()
        return fused_module(self.base, adapted, self.base_types[0], dequantize)

    def export(self) -> "DoRALayer":
        """A plain DoRA layer over the same base that computes the same: this layer.

        A variant makes one; see `mlx_dora.layers.variants`.
        """
        return self

    def set_base(self, base: nn.Module) -> None:
        """Take another base and set m to the norms of its rows.

        Raises:
            DoRAError: If `base` is not exactly of a class this layer adapts: a subclass
                may compute something else.
        """
        self.check_base(base)
        self._put_base(base)

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
            lora_a: Down projection, laid out as the layer's own.
            lora_b: Up projection, laid out as the layer's own.
            m: Magnitudes, shape as the layer's own.
            scale: Multiplier s.
            norm: Norms of the adapted rows, shape of `m`, float32.
        """
        self.lora_a, self.lora_b, self.m, self.scale = lora_a, lora_b, m, scale
        self._cache = EvalCache(sources=self._sources(), norm=norm)

    def norm(self) -> mx.array:
        """Norm ‖W0 + s·BA‖ of every row, float32, without a gradient."""
        if "_norm" in self:
            return self["_norm"]
        base = self[self.base_name]
        return adapted_norm(
            weight_from(base, base),
            *self.factors(),
            self.scale,
            squared_base=self["_squared_base"],
        )

    def gain(self) -> mx.array:
        """Gain g = m/n of every row, float32; exact and cached in eval mode."""
        if not self.training and (cache := self.eval_cache()) is not None:
            assert cache.gain is not None
            return cache.gain
        return row_gain(self["m"], self["_norm"] if "_norm" in self else self.norm())

    def bias_offset(self, gain: mx.array) -> mx.array | None:
        """Shift by (1 − g)·b: in g∘(W0x + b + …) b has been multiplied by g."""
        bias = self[self.base_name].get("bias")
        return None if bias is None else (1 - gain) * bias.astype(mx.float32)

    def hold_norm(self) -> None:
        """Compute the norm now and use it until `release_norm`."""
        self.release_norm()
        self._norm = self.norm()

    def release_norm(self) -> None:
        """Go back to computing the norm on each call."""
        self.pop("_norm", None)

    def invalidate(self) -> None:
        """Forget what eval mode has cached, after writing into a parameter's array."""
        self._cache = None

    def eval_cache(self) -> EvalCache | None:
        """Norm and gain of eval mode; None while training or being traced."""
        if self.training:
            return None
        cache, sources = self._cache, self._sources()
        if cache is None or not cache.is_of(sources):
            cache = None
        elif cache.gain is not None:
            return cache
        if is_traced([self[name] for name in self.cached]):
            return None
        if cache is None:
            updates = self._update().matrices()
            parts = zip(matrices(weight_of(self.base)), updates, strict=True)
            norms = [exact_terms(*part).norm for part in parts]
            norm = norms[0] if self["m"].ndim == 1 else mx.stack(norms)
        else:
            norm = cache.norm
        # Gradients in eval mode go through here too: the norm is a constant for them.
        norm = mx.stop_gradient(norm)
        gain = row_gain(self["m"], norm)
        mx.eval(norm, gain)  # a server may fill it in one thread, use it in another
        self._cache = EvalCache(sources=sources, norm=norm, gain=gain)
        return self._cache

    def epilogue(self, dtype: mx.Dtype) -> Epilogue | None:
        """Eval mode's constants for activations of `dtype`, if there is a cache."""
        cache = self.eval_cache()
        if cache is None or cache.gain is None:
            return None
        known = cache.epilogue
        if known is not None and known.lora_a.dtype == dtype:
            return known
        lora_a, lora_b = self.factors()
        made = Epilogue(
            lora_a=lora_a.astype(dtype),
            up=self.scale * lora_b.astype(mx.float32),
            gain=cache.gain,
            offset=self.bias_offset(cache.gain),
        )
        mx.eval(made.lora_a, made.up, made.offset)
        self._cache = EvalCache(
            sources=cache.sources, norm=cache.norm, gain=cache.gain, epilogue=made
        )
        return made

    def _sources(self) -> Sources:
        base = self[self.base_name]
        return (*map(self.get, self.cached), base["weight"], base.get("bias"))

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

    def _put_base(self, base: nn.Module) -> None:
        self[self.base_name] = base
        self._measure_base()
        self.m = mx.sqrt(self["_squared_base"])

    def _measure_base(self, squared: mx.array | None = None) -> None:
        """Keep ‖W0‖² of every row, computed here unless it is known."""
        squared = row_squares(weight_of(self.base)) if squared is None else squared
        mx.eval(squared)  # an unevaluated array cannot be used from another thread
        self._squared_base = squared
        # An attribute of the object, not a parameter: held for its identity alone.
        object.__setattr__(self, "_measured", self.base["weight"])
