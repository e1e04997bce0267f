"""Frozen linear layers and embeddings whose rows are divided among processes.

They stand in for the modules of a model that does not fit on one machine; see
`mlx_dora.matrix.sharded`. Every process must call them in the same order, with inputs
of the same shapes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import mlx.core as mx
import mlx.nn as nn

from mlx_dora.errors import DoRAError
from mlx_dora.matrix.sharded import Part, ShardedWeight, looked_up_in, product_with
from mlx_dora.matrix.weight import (
    TENSOR_COLUMNS,
    TENSOR_ROWS,
    as_packed,
    weight_of,
)

SHARDABLE = (nn.Linear, nn.QuantizedLinear, nn.Embedding, nn.QuantizedEmbedding)
"""Classes of modules that can be divided, exactly."""


class _Held:
    """Keeps a gathered weight between the products of a block of code."""

    def __init__(self, after: mx.array) -> None:
        self._after = after
        self._whole: Part | None = None

    def of(self, weight: ShardedWeight) -> Part:
        """Return the whole weight; gather it at the first call."""
        if self._whole is None:
            self._whole = weight.whole([self._after])
        return self._whole


class ShardedModule(nn.Module):
    """Base class of modules that hold a process's share of a frozen weight.

    The arrays have the names of the divided module's; ``bias`` is whole.

    Attributes:
        group: The processes, in the order of their rows.
    """

    group: mx.distributed.Group
    _held: _Held | None
    _path: str

    @classmethod
    def from_part(
        cls,
        part: Part,
        squares: mx.array,
        group: mx.distributed.Group,
        bias: mx.array | None = None,
    ) -> Self:
        """Make the module of a process.

        Args:
            part: This process's rows. Shape ``(out / processes, in)``.
            squares: ‖W0‖² of every row. Shape ``(out,)``, float32.
            group: The processes.
            bias: Bias of every row, shape ``(out,)``, or None.
        """
        module = cls.__new__(cls)
        nn.Module.__init__(module)
        arrays: dict[str, Any] = {"weight": part}
        if (packed := as_packed(part)) is not None:
            arrays = packed.parts
            for name, value in packed.form.items():
                setattr(module, name, value)
        # Not by attribute: reading `weight` raises.
        for name, array in arrays.items():
            module[name] = array
        if bias is not None:
            module["bias"] = bias
        module["_row_squares"] = squares
        module.group = group
        object.__setattr__(module, "_held", None)
        module.name_as(cls.__name__)
        module.freeze()
        return module

    @property
    def weight(self) -> Any:
        """Always raises: this process holds only a part of the weight."""
        raise DoRAError(
            f"{self._path}: the model's own code reads this weight instead of "
            "calling the module, so it cannot be divided among processes."
        )

    def name_as(self, path: str) -> None:
        """Set the path in the model, for messages."""
        object.__setattr__(self, "_path", path)

    @property
    def whole_weight(self) -> ShardedWeight:
        """The weight, of which this process holds a part."""
        weight = weight_of(self)
        assert isinstance(weight, ShardedWeight)
        return weight

    def unfreeze(self, *_: Any, **__: Any) -> Self:
        """Do nothing: a part of a weight is never trained."""
        return self

    def _extra_repr(self) -> str:
        out, width = self.whole_weight.shape
        return f"input_dims={width}, output_dims={out}, processes={self.group.size()}"

    def _product(self, x: mx.array) -> mx.array:
        weight = self.whole_weight
        if self._held is not None:
            return product_with(self._held.of(weight), x)
        return weight.matmul(x)


class ShardedLinear(ShardedModule, nn.Linear):
    """A frozen linear layer, dense or packed, whose rows are divided among processes.

    Input ``(..., in)``, of the same shape in every process; output ``(..., out)``.
    """

    def __call__(self, x: mx.array) -> mx.array:
        """Return W·x + b."""
        y = self._product(x)
        return y + self["bias"] if "bias" in self else y

    def to_lora(self, r: int, scale: float, dropout: float) -> nn.Module:
        """Return mlx-lm's LoRA layer over this module; mlx-lm calls this."""
        from mlx_lm.tuner.lora import LoRALinear

        out, width = self.whole_weight.shape
        layer = LoRALinear(width, out, r=r, dropout=dropout, scale=scale)
        layer.linear = self
        return layer


class ShardedEmbedding(ShardedModule, nn.Embedding):
    """A frozen embedding, dense or packed, whose rows are divided among processes.

    Tokens have the same shape in every process.
    """

    def __call__(self, x: mx.array) -> mx.array:
        """Return the rows of the tokens `x`, shape ``(..., dims)``."""
        weight = self.whole_weight
        if self._held is not None:
            return looked_up_in(self._held.of(weight), x)
        return weight.looked_up(x)

    def as_linear(self, x: mx.array) -> mx.array:
        """Project ``(..., dims)`` onto the rows, as a tied output head does."""
        return self._product(x)

    def to_lora(self, r: int, scale: float, dropout: float) -> nn.Module:
        """Return mlx-lm's LoRA layer over this module; mlx-lm calls this."""
        from mlx_lm.tuner.lora import LoRAEmbedding

        rows, dims = self.whole_weight.shape
        layer = LoRAEmbedding(rows, dims, r=r, dropout=dropout, scale=scale)
        layer.embedding = self
        return layer


def has_divided(model: nn.Module) -> bool:
    """Return whether processes divide the weights of a model, in either way."""
    kinds = (ShardedModule, *TENSOR_ROWS, *TENSOR_COLUMNS)
    return any(isinstance(module, kinds) for module in model.modules())


def sharded_modules(model: nn.Module) -> list[ShardedModule]:
    """Return the modules of a model that are divided among processes."""
    return [m for m in model.modules() if isinstance(m, ShardedModule)]


@contextmanager
def held_whole(model: nn.Module, after: mx.array) -> Iterator[None]:
    """Gather each divided weight once, at its first use in the block, and keep it.

    For several products with one weight, such as those of an output head with chunks of
    tokens: their number may differ between processes.

    Args:
        model: A model; nothing changes if none of its weights is divided.
        after: Array to wait for before a weight is gathered.
    """
    modules = sharded_modules(model)
    for module in modules:
        object.__setattr__(module, "_held", _Held(after))
    try:
        yield
    finally:
        for module in modules:
            object.__setattr__(module, "_held", None)
