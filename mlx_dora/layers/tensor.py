"""DoRA and LoRA for MLX's linear layers that processes divide (tensor parallelism).

All processes compute with the same batch. `nn.AllToShardedLinear` has rows of W0, so
that a process computes some of the outputs; `nn.ShardedToAllLinear` has columns, which
a process multiplies with its part of the input, and the products are summed. The
adapter is whole in every process, which uses its part of it.

A process's gradient of a parameter is scaled so that the mean over the processes is the
gradient of the whole model, as of a parameter that all use alike.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, ClassVar, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.nn.layers.distributed import sum_gradients

from mlx_dora.kernels.rescale import compose, rescale
from mlx_dora.layers._layer import DoRALayer
from mlx_dora.matrix.sharded import ShardedWeight, product_with
from mlx_dora.matrix.terms import trained_gain
from mlx_dora.matrix.weight import TENSOR_COLUMNS, TENSOR_ROWS, weight_of

TENSOR_TYPES = (*TENSOR_ROWS, *TENSOR_COLUMNS)
"""MLX's classes of linear layers for tensor parallelism."""


class DoRATensorLinear(DoRALayer):
    """DoRA for `nn.AllToShardedLinear`, `nn.ShardedToAllLinear` and quantized ones.

    The equation, the parameters and their initial values are those of `DoRALinear`, and
    the parameters are whole in every process.

    Attributes:
        linear: The frozen base.
        enabled: If False, the layer computes the output of its base.
    """

    base_name: ClassVar[str] = "linear"
    linear: nn.Module

    @classmethod
    def base_types(cls) -> tuple[type[nn.Module], ...]:
        """Return the classes of modules that this layer can wrap."""
        return TENSOR_TYPES

    def computed_with(
        self, lora_a: mx.array, lora_b: mx.array, rows: mx.array
    ) -> tuple[mx.array, mx.array, mx.array]:
        """Return the parts of A, B and one value per row that this process uses."""
        weight = divided_weight(self.linear)
        own = weight.own
        if weight.axis:
            return lora_a[own], lora_b, rows
        return lora_a, lora_b[:, own], rows[own]

    def __call__(self, x: mx.array) -> mx.array:
        """Return the adapted output for `x`; of divided rows, this process's outputs.

        Args:
            x: Input, the same in every process, shape ``(..., in)``; of divided
                columns, this process's part ``(..., in / processes)``.
        """
        if not self.enabled:
            return self.linear(x)
        if not self.training and (rest := self.epilogue(x.dtype)) is not None:
            y, h = products(self.linear, x, rest.lora_a, self.dropout)
            return compose(y, h, rest.up, rest.gain, rest.offset)
        weight = divided_weight(self.linear)
        lora_a, lora_b, m = self.lora_a, self.lora_b, self.m
        if weight.axis:
            lora_a = _summed(lora_a, weight)
            n = self.norm()
        else:
            lora_a, lora_b, m = (_summed(p, weight) for p in (lora_a, lora_b, m))
            n = self["_norm"][weight.own] if "_norm" in self else self.own_norm()
        lora_a, lora_b, m = self.computed_with(lora_a, lora_b, m)
        g = trained_gain(m, n)
        y, h = products(self.linear, x, lora_a.astype(x.dtype), self.dropout)
        up = lora_b.astype(mx.float32)
        return rescale(y, h, up, g, self.bias_offset(g), self.scale)


def divided_weight(module: nn.Module) -> ShardedWeight:
    """Return the weight of a module of the `TENSOR_TYPES`."""
    weight = weight_of(module)
    assert isinstance(weight, ShardedWeight)
    return weight


def products(
    base: nn.Module, x: mx.array, lora_a: mx.array, dropout: nn.Dropout
) -> tuple[mx.array, mx.array]:
    """Return W0·x + b and x·A, summed over the processes if they divide the columns.

    Args:
        base: A module of the `TENSOR_TYPES`.
        x: Input of this process.
        lora_a: The part of A for this input, in the dtype of `x`.
        dropout: Applied to the input of A; columns get the mask of the whole input.
    """
    weight = divided_weight(base)
    if not weight.axis:
        x = cast(Callable[[mx.array], mx.array], sum_gradients(weight.group))(x)
        y, h = product_with(weight.part, x), dropout(x) @ lora_a
    else:
        out = weight.shape[0]
        own = [product_with(weight.part, x), _dropped(x, weight, dropout) @ lora_a]
        # One message for both.
        both = mx.distributed.all_sum(mx.concatenate(own, axis=-1), group=weight.group)
        y, h = both[..., :out], both[..., out:]
    y = y + base["bias"] if "bias" in base else y
    return (y if y.dtype == x.dtype else y.astype(x.dtype)), h


def _dropped(x: mx.array, weight: ShardedWeight, dropout: nn.Dropout) -> mx.array:
    if not dropout.training or dropout._p_1 == 1:
        return x
    whole = dropout(mx.ones((*x.shape[:-1], weight.shape[1]), x.dtype))
    return x * whole[..., weight.own]


def _summed(parameter: mx.array, weight: ShardedWeight) -> mx.array:
    """Return a parameter of whose gradient each process computes a part.

    The mean of the scaled parts is their sum.
    """
    count = weight.group.size()

    @mx.custom_function
    def same(parameter: mx.array) -> mx.array:
        return parameter

    @same.vjp
    def _(_primal: mx.array, cotangent: mx.array, _output: mx.array) -> mx.array:
        return count * cotangent

    return cast(Callable[[mx.array], mx.array], same)(parameter)


def lora_over(base: nn.Module, r: int, scale: float, dropout: float) -> nn.Module:
    """Return a layer like mlx-lm's LoRALinear over a module of the `TENSOR_TYPES`."""
    out, width = divided_weight(base).shape
    layer = _lora_class()(width, out, r=r, dropout=dropout, scale=scale)
    layer.linear = base
    return layer


@cache
def _lora_class() -> Any:
    from mlx_lm.tuner.lora import LoRALinear

    class LoRATensorLinear(LoRALinear):
        """LoRA for the `TENSOR_TYPES`; parameters are whole in every process."""

        def __call__(self, x: mx.array) -> mx.array:
            weight = divided_weight(self.linear)
            lora_a, lora_b = _summed(self.lora_a, weight), self.lora_b
            if weight.axis:
                lora_a = lora_a[weight.own]
            else:
                lora_b = _summed(lora_b, weight)[:, weight.own]
            y, h = products(self.linear, x, lora_a.astype(x.dtype), self.dropout)
            return y + (self.scale * (h @ lora_b)).astype(x.dtype)

    return LoRATensorLinear
