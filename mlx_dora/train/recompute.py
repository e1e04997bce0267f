"""Gradient checkpointing of a model's blocks, for a while."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_dora.errors import DoRAError


class _KeyedDropout(nn.Dropout):
    """Dropout with a given random key, so that a recomputed pass drops the same."""

    _key: mx.array

    def __call__(self, x: mx.array) -> mx.array:
        if not self.training:
            return x
        # The key is an input of the checkpointed function; no gradient may go there.
        kept = mx.stop_gradient(mx.random.bernoulli(self._p_1, x.shape, self._key))
        return (kept * x) * (1 / self._p_1)


@contextmanager
def recomputed_blocks(model: nn.Module, enabled: bool = True) -> Iterator[None]:
    """Recompute each block's activations in the backward pass instead of keeping them.

    While this lasts, each block of ``model.layers`` (and each dropout in it) is an
    instance of a subclass of its class; the classes themselves stay as they are.
    `mx.checkpoint` alone would draw other dropout masks when it recomputes, and so give
    the gradient of another function.

    Args:
        model: A model with blocks in ``layers``.
        enabled: False does nothing.

    Raises:
        DoRAError: If the model has no blocks.
    """
    if not enabled:
        yield
        return
    blocks = [one for one in getattr(model, "layers", []) if isinstance(one, nn.Module)]
    if not blocks:
        raise DoRAError(
            f"grad_checkpoint needs a model with blocks in .layers; "
            f"{type(model).__name__} has none."
        )
    changed: list[tuple[nn.Module, type[nn.Module]]] = []
    made: dict[type[nn.Module], type[nn.Module]] = {}
    try:
        for block in blocks:
            dropouts = [
                m for m in block.modules() if type(m) is nn.Dropout and m._p_1 < 1
            ]
            for dropout in dropouts:
                changed.append((dropout, nn.Dropout))
                dropout.__class__ = _KeyedDropout
            kind = type(block)
            changed.append((block, kind))
            if kind not in made:
                made[kind] = _checkpointed(kind)
            block.__class__ = made[kind]
        yield
    finally:
        for module, kind in reversed(changed):
            module.__class__ = kind


def _checkpointed(kind: type[nn.Module]) -> type[nn.Module]:
    plain: Any = kind.__call__

    def call(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not block.training:
            return plain(block, *args, **kwargs)
        dropouts = [m for m in block.modules() if isinstance(m, _KeyedDropout)]
        keys = None
        if dropouts:
            limit = 2**32 - 1
            keys = mx.random.randint(0, limit, (len(dropouts), 2), dtype=mx.uint32)

        def inner(parameters: Any, keys: Any, *args: Any, **kwargs: Any) -> Any:
            block.update(parameters)
            for i, dropout in enumerate(dropouts):
                # Kept out of the module's state, where it would be a parameter.
                object.__setattr__(dropout, "_key", None if keys is None else keys[i])
            return plain(block, *args, **kwargs)

        parameters = block.trainable_parameters()
        return recomputed(inner, parameters, keys, *args, **kwargs)

    return type(kind.__name__, (kind,), {"__call__": call})


def recomputed(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function that is computed anew in the backward pass, when its turn comes.

    `mx.checkpoint` lets the second computation begin as soon as the first has ended:
    MLX then works on many blocks at a time, and keeps what they make. Here it waits for
    the gradient that it serves.

    Args:
        function: Returns an array. No gradient goes to what it does not get as a
            floating-point array among its arguments.
        args: Trees of arrays and anything else.
        kwargs: The same.
    """
    # kwargs first: flattening forgets what is empty, but only at the end of a list.
    flat = cast(list[tuple[str, Any]], tree_flatten([kwargs, list(args)]))
    places = [
        place
        for place, (_, value) in enumerate(flat)
        if isinstance(value, mx.array) and mx.issubdtype(value.dtype, mx.floating)
    ]

    def of_arrays(*arrays: mx.array) -> mx.array:
        values = list(flat)
        for place, array in zip(places, arrays, strict=True):
            values[place] = (flat[place][0], array)
        new_kwargs, new_args = tree_unflatten(values)
        return function(*new_args, **new_kwargs)

    forward = mx.custom_function(of_arrays)

    @forward.vjp
    def _(primals: Any, cotangent: mx.array, output: mx.array) -> Any:
        primals = mx.depends(list(primals), [cotangent])
        _, gradients = mx.vjp(of_arrays, primals, [cotangent])
        # None goes on before all are there: they hold on to what was recomputed.
        return tuple(mx.depends(gradients, gradients))

    return forward(*(flat[place][1] for place in places))
