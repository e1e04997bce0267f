"""The base class of DoRA layers: the frozen base, norms and eval-mode cache."""

import math
from dataclasses import replace
from operator import is_
from typing import Any, ClassVar, Self

import mlx.core as mx
import mlx.nn as nn

from mlx_dora.errors import DoRAError
from mlx_dora.kernels.adapted_norm import divided_norm, own_norm, row_norm
from mlx_dora.layers._cache import Epilogue, EvalCache, Sources, is_traced
from mlx_dora.layers._fuse import fused_module
from mlx_dora.layers._shared import SharedPass
from mlx_dora.layers.layout import Layout, rearranged
from mlx_dora.matrix.low_rank import Adapted, LowRank
from mlx_dora.matrix.sharded import ShardedWeight
from mlx_dora.matrix.terms import exact_terms, row_gain
from mlx_dora.matrix.weight import matrices, row_squares, weight_from, weight_of


def unsupported(module: nn.Module, known: tuple[type[nn.Module], ...]) -> DoRAError:
    """Return the error for a module whose class cannot be adapted."""
    names = ", ".join(cls.__name__ for cls in known)
    return DoRAError(
        f"{type(module).__module__}.{type(module).__name__} cannot take DoRA; "
        f"supported are exactly {names} (a subclass may compute something else)."
    )


class _ReadDirectly(DoRAError, AttributeError):
    """Raised when `DoRALayer.weight` is read; makes ``hasattr`` return False."""


def read_directly(path: str) -> DoRAError:
    """Return the error for a layer whose weight is read instead of being called."""
    return _ReadDirectly(
        f"{path}: the model's own code reads its weight instead of calling it, so it "
        "cannot be adapted; leave it out by giving keys."
    )


class Kind:
    """Facts about a layer's parametrization; these are those of plain DoRA.

    Attributes:
        name: Value of `DoRAConfig.variant` (or ``init``).
        fixed: Names of parameters that are kept but not trained.
        cached: Names of the parameters that eval-mode constants are computed from;
            empty if nothing is cached.
        room: Ratio of the width of the factors to the requested rank.
    """

    name: ClassVar[str] = "dora"
    fixed: ClassVar[tuple[str, ...]] = ()
    cached: ClassVar[tuple[str, ...]] = ("m", "lora_a", "lora_b")
    room: int = 1


class DoRALayer(nn.Module):
    """Abstract base class of the adapted layers.

    A subclass names the attribute that holds the frozen base, specifies the layout of
    its factors, and computes its output. Besides its parameters, a layer keeps ‖W0‖² of
    the base, the norms between `hold_norm` and `release_norm`, and the eval-mode cache.
    """

    base_name: ClassVar[str]
    layout: ClassVar[Layout] = "linear"
    path: str = ""  # path in the model, for messages
    dropout: nn.Dropout
    scale: float
    enabled: bool
    lora_a: mx.array
    lora_b: mx.array
    m: mx.array
    kind: Any = Kind()  # a variant's own code knows its subclass
    _cache: EvalCache | None
    _measured: mx.array
    _shared: SharedPass | None = None

    @classmethod
    def base_types(cls) -> tuple[type[nn.Module], ...]:
        """Return the classes of modules that this layer can wrap, dense first."""
        raise NotImplementedError

    @classmethod
    def from_base(
        cls, module: Any, r: int = 8, dropout: float = 0.0, scale: float = 20.0
    ) -> Self:
        """Wrap a module, which is kept unchanged in the attribute `base_name`.

        Args:
            module: A module of one of the `base_types`.
            r: Rank of the update.
            dropout: Dropout probability in the low-rank branch.
            scale: Multiplier s of the update.

        Raises:
            DoRAError: If `module` is of any other class.
        """
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._adapt(module, r, dropout, scale)
        return layer

    def _adapt(self, base: nn.Module, r: int, dropout: float, scale: float) -> None:
        """Set the base, and initialize a random A, B = 0 and m = ‖W0‖."""
        self.check_base(base)
        *stack, out, width = weight_of(base).shape
        a, b = mx.zeros((*stack, width, r)), mx.zeros((*stack, r, out))
        lora_a, lora_b = rearranged(self.layout, a, b)
        fan = out if self.layout == "embedding" else width  # other axis of lora_a
        bound = 1 / math.sqrt(fan)  # Kaiming-uniform with a = sqrt(5)
        self.dropout = nn.Dropout(p=dropout)
        self.scale = scale
        self.enabled = True
        self.lora_a = mx.random.uniform(low=-bound, high=bound, shape=lora_a.shape)
        self.lora_b = mx.zeros(lora_b.shape)
        self._put_base(base)

    @property
    def base(self) -> nn.Module:
        """The frozen module this layer wraps."""
        return self[self.base_name]

    @property
    def weight(self) -> mx.array:
        """Always raises: reading the base weight directly would bypass the adapter."""
        raise read_directly(self.path or type(self).__name__)

    def _extra_repr(self) -> str:
        if "lora_b" not in self:
            return "magnitude only"
        return f"rank={self._update().rank}, scale={self.scale:g}"

    def factors(self) -> tuple[mx.array, mx.array]:
        """Return A ``(..., in, r)`` and B ``(..., r, out)`` of the update."""
        stored = self["lora_a"], self["lora_b"]
        return stored if self.layout == "linear" else rearranged(self.layout, *stored)

    def computed_with(
        self, lora_a: mx.array, lora_b: mx.array, rows: mx.array
    ) -> tuple[mx.array, mx.array, mx.array]:
        """Return the parts of A, B and one value per row that this process uses: all.

        A process that computes a part of the outputs uses less.
        """
        return lora_a, lora_b, rows

    def adapted(self) -> Adapted:
        """Return the adapter of the base's weight: A, B, s and m."""
        return Adapted(update=self._update(), m=self["m"])

    def _update(self) -> LowRank:
        lora_a, lora_b = self.factors()
        return LowRank(lora_a=lora_a, lora_b=lora_b, scale=self.scale)

    def fuse(self, dequantize: bool = False) -> Any:
        """Convert the adapted layer to a plain module.

        Args:
            dequantize: Return a dense module for a packed base too. Repacking loses
                most of a small update (`mlx_dora.fuse_dora` reports how much).

        Returns:
            A module of the base's class (dense if `dequantize`), in the base's dtype.

        Raises:
            DoRAError: If the adapted weight holds NaN or inf.
        """
        adapted = self.adapted().matrices()
        return fused_module(self.base, adapted, self.base_types()[0], dequantize)

    def export(self) -> "DoRALayer":
        """Return an equivalent plain DoRA layer over the same base: this layer.

        A variant returns a new layer; see `mlx_dora.layers.variants`.
        """
        return self

    def set_base(self, base: nn.Module) -> None:
        """Replace the base, and set m to the norms of its rows.

        Raises:
            DoRAError: If the class of `base` is none of the `base_types`. Subclasses
                are refused, because they may compute something else.
        """
        self.check_base(base)
        self._put_base(base)

    def check_base(self, base: nn.Module) -> None:
        """Raise DoRAError if the class of `base` is none of the `base_types`."""
        if type(base) not in self.base_types():
            raise unsupported(base, self.base_types())

    def take(
        self,
        lora_a: mx.array,
        lora_b: mx.array,
        m: mx.array,
        scale: float,
        norm: mx.array,
    ) -> None:
        """Set another adapter, of any rank, whose norms are known.

        The base weight is then not read to compute norms in eval mode.

        Args:
            lora_a: Down projection A, in the layout of `self.lora_a`.
            lora_b: Up projection B, in the layout of `self.lora_b`.
            m: Magnitudes, shape of `self.m`.
            scale: Multiplier s.
            norm: Norms of the adapted rows, shape of `m`, float32.
        """
        self.lora_a, self.lora_b, self.m, self.scale = lora_a, lora_b, m, scale
        self._cache_gain(self._sources(), norm)

    def norm(self) -> mx.array:
        """Return the norm ‖W0 + s·BA‖ of every row in float32, without a gradient."""
        if "_norm" in self:
            return self["_norm"]
        base = self[self.base_name]
        weight = weight_from(base, base)
        if isinstance(weight, ShardedWeight):
            squared = self["_squared_base"]
            return divided_norm(weight, *self.factors(), self.scale, squared)
        norm = row_norm(
            weight,
            *self.factors(),
            self.scale,
            squared_base=self["_squared_base"],
        )
        return norm if self._shared is None else self.keep_norm(norm)

    def keep_norm(self, norm: mx.array) -> mx.array:
        """Return a norm computed by a call, and hold it in a shared pass."""
        if self._shared is not None:
            self._norm = norm
        return norm

    def own_norm(self) -> mx.array:
        """Return `norm` of the rows that this process holds of a divided weight."""
        weight = weight_of(self.base)
        assert isinstance(weight, ShardedWeight)
        squared = self["_squared_base"]
        return own_norm(weight, *self.factors(), self.scale, squared)

    def gain(self) -> mx.array:
        """Return the gain g = m/n of every row, float32; exact, cached in eval mode."""
        if not self.training and (cache := self.eval_cache()) is not None:
            return cache.gain
        return row_gain(self["m"], self.norm())

    def bias_offset(self, gain: mx.array) -> mx.array | None:
        """Return (1 − g)·b, which corrects g∘(W0x + b + …) for the scaled bias."""
        bias = self[self.base_name].get("bias")
        return None if bias is None else (1 - gain) * bias.astype(mx.float32)

    def hold_norm(self) -> None:
        """Compute the norm now, and reuse it until `release_norm`."""
        self.release_norm()
        self._norm = self.norm()

    def release_norm(self) -> None:
        """Compute the norm on each call again."""
        self.pop("_norm", None)

    def invalidate(self) -> None:
        """Clear the eval-mode cache; call this after writing into a parameter array."""
        self._cache = None

    def eval_cache(self) -> EvalCache | None:
        """Return the gain of eval mode; None while training or being traced."""
        if self.training:
            return None
        cache, sources = self._cache, self._sources()
        if cache is not None and all(map(is_, cache.sources, sources)):
            return cache
        if is_traced([self[name] for name in self.kind.cached]):
            return None
        updates = self._update().matrices()
        parts = zip(matrices(weight_of(self.base)), updates, strict=True)
        norms = [exact_terms(*part).norm for part in parts]
        norm = norms[0] if self["m"].ndim == 1 else mx.stack(norms)
        self._cache_gain(sources, norm)
        return self._cache

    def _cache_gain(self, sources: Sources, norm: mx.array) -> None:
        # Gradients in eval mode treat the norm as a constant too.
        gain = row_gain(self["m"], mx.stop_gradient(norm))
        mx.eval(gain)  # a server may fill and use it in different threads
        self._cache = EvalCache(sources=sources, gain=gain)

    def epilogue(self, dtype: mx.Dtype) -> Epilogue | None:
        """Return eval-mode constants for activations of `dtype`; None if not cached."""
        cache = self.eval_cache()
        if cache is None:
            return None
        known = cache.epilogue
        if known is not None and known.lora_a.dtype == dtype:
            return known
        lora_a, lora_b, gain = self.computed_with(*self.factors(), cache.gain)
        made = Epilogue(
            lora_a=lora_a.astype(dtype),
            up=self.scale * lora_b.astype(mx.float32),
            gain=gain,
            offset=self.bias_offset(gain),
        )
        mx.eval(made.lora_a, made.up, made.offset)
        self._cache = replace(cache, epilogue=made)
        return made

    def _sources(self) -> Sources:
        base = self[self.base_name]
        return (*map(self.get, self.kind.cached), base["weight"], base.get("bias"))

    def __setattr__(self, key: str, value: Any) -> None:
        super().__setattr__(key, value)
        # The cache does not depend on `enabled`.
        if not key.startswith("_") and key != "enabled":
            self.invalidate()

    def _set_training_mode(self, mode: bool) -> None:
        # MLX's hook for train() and eval(). Detect here whether the base weight was
        # replaced directly, for example by `model.load_weights`.
        super()._set_training_mode(mode)
        self.invalidate()
        if self._measured is not self.base["weight"]:
            self._measure_base()

    def _put_base(self, base: nn.Module) -> None:
        self[self.base_name] = base
        self._measure_base()
        self.m = mx.sqrt(self["_squared_base"])

    def _measure_base(self, squared: mx.array | None = None) -> None:
        """Store ‖W0‖² of every row, computed here unless given."""
        squared = row_squares(weight_of(self.base)) if squared is None else squared
        mx.eval(squared)  # an unevaluated array cannot be used from another thread
        self._squared_base = squared
        # An attribute, not a parameter; only its identity is used.
        object.__setattr__(self, "_measured", self.base["weight"])
