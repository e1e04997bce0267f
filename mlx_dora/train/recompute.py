"""Gradient checkpointing of a model's blocks."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_dora.errors import DoRAError
from mlx_dora.layers import DoRALayer, shared_pass


class _KeyedDropout(nn.Dropout):
    """Dropout with a given random key, so that a recomputed pass uses the same mask."""

    _key: mx.array

    def __call__(self, x: mx.array) -> mx.array:
        if not self.training:
            return x
        # The key is an input of the checkpointed function and has no gradient.
        kept = mx.stop_gradient(mx.random.bernoulli(self._p_1, x.shape, self._key))
        return (kept * x) * (1 / self._p_1)


@contextmanager
def recomputed_blocks(model: nn.Module, enabled: bool = True) -> Iterator[None]:
    """Recompute each block's activations in the backward pass instead of keeping them.

    Inside the context, each block of ``model.layers`` (and each dropout in it) is an
    instance of a subclass of its class; the classes themselves do not change. Plain
    `mx.checkpoint` would draw new dropout masks when it recomputes, and thus return the
    gradient of a different function; and it would compute the norms of adapted rows
    twice. Here the first pass keeps them, one number per row.

    Args:
        model: A model with blocks in ``layers``.
        enabled: Whether to recompute; if False, nothing changes.

    Raises:
        DoRAError: If the model has no blocks.
    """
    if not enabled:
        yield
        return
    blocks = [b for b in getattr(model, "layers", []) if isinstance(b, nn.Module)]
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

        layers = [m for m in block.modules() if isinstance(m, DoRALayer)]

        def inner(
            known: dict[str, mx.array],
            parameters: Any,
            keys: Any,
            *args: Any,
            **kwargs: Any,
        ) -> tuple[Any, dict[str, mx.array]]:
            block.update(parameters)
            for i, dropout in enumerate(dropouts):
                # Bypasses the module's state, where the key would be a parameter.
                object.__setattr__(dropout, "_key", None if keys is None else keys[i])
            with shared_pass(layers, known) as kept:
                output = plain(block, *args, **kwargs)
            return output, kept

        parameters = block.trainable_parameters()
        return recomputed(inner, parameters, keys, *args, **kwargs)

    return type(kind.__name__, (kind,), {"__call__": call})


def recomputed(
    function: Callable[..., tuple[mx.array, dict[str, mx.array]]],
    *args: Any,
    **kwargs: Any,
) -> mx.array:
    """Call a function, and recompute it in the backward pass.

    With `mx.checkpoint` the recomputation may begin as soon as the forward pass has
    ended; MLX then works on many blocks at a time and keeps their results. Here the
    recomputation waits for the gradient of the function's output.

    Args:
        function: Takes a dictionary of constants, then the arguments; returns an array
            and a dictionary of constants. The first call gets an empty one, and the
            recomputation what the first call returned. Only floating-point arrays among
            the arguments receive gradients.
        args: Trees of arrays and other values.
        kwargs: Trees of arrays and other values.

    Returns:
        The array that `function` returns.
    """
    # kwargs first: flattening drops an empty tree only at the end of a list.
    flat = cast(list[tuple[str, Any]], tree_flatten([kwargs, list(args)]))
    places = [
        place
        for place, (_, value) in enumerate(flat)
        if isinstance(value, mx.array) and mx.issubdtype(value.dtype, mx.floating)
    ]

    def of_arrays(
        known: dict[str, mx.array], arrays: Sequence[mx.array]
    ) -> tuple[mx.array, dict[str, mx.array]]:
        values = list(flat)
        for place, array in zip(places, arrays, strict=True):
            values[place] = (flat[place][0], array)
        new_kwargs, new_args = tree_unflatten(values)
        return function(known, *new_args, **new_kwargs)

    @mx.custom_function
    def forward(arrays: list[mx.array]) -> tuple[mx.array, dict[str, mx.array]]:
        return of_arrays({}, arrays)

    @forward.vjp
    def _(primals: Any, cotangents: Any, outputs: Any) -> Any:
        (cotangent, _), (_, known) = cotangents, outputs
        primals = mx.depends(primals, [cotangent])
        _, gradients = mx.vjp(
            lambda *arrays: of_arrays(known, arrays)[0], primals, [cotangent]
        )
        # Release all gradients together, since each keeps recomputed arrays alive.
        return mx.depends(gradients, gradients)

    output, _ = cast(Any, forward([flat[place][1] for place in places]))
    return output
