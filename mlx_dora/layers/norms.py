"""Computes the norms of a model once for several passes."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_dora.kernels.adapted_norm import norm_by_columns, own_inner
from mlx_dora.layers._layer import DoRALayer
from mlx_dora.layers._shared import SharedPass
from mlx_dora.matrix.sharded import ShardedWeight
from mlx_dora.matrix.weight import weight_of

_OUTPUT = ".output"


@contextmanager
def held_norms(model: nn.Module) -> Iterator[None]:
    """Compute every adapted norm on entry and reuse it until exit.

    Norms depend only on the parameters. One computation therefore serves all
    micro-batches of a step. Leave the context before the optimizer changes the
    parameters.

    Norms of weights that are divided among processes are evaluated on entry: inside the
    context, a process may use them while others do not.
    """
    layers = [m for m in model.modules() if isinstance(m, DoRALayer)]
    divided: tuple[list[DoRALayer], list[DoRALayer]] = [], []
    for layer in layers:
        weight = weight_of(layer.base)
        if isinstance(weight, ShardedWeight):
            divided[weight.axis].append(layer)
        else:
            layer.hold_norm()
    rows, columns = divided
    if rows:
        _gather_norms(rows)
    if columns:
        _sum_norms(columns)
    try:
        yield
    finally:
        for layer in layers:
            layer.release_norm()


@contextmanager
def shared_pass(
    layers: Sequence[DoRALayer], known: dict[str, mx.array]
) -> Iterator[dict[str, mx.array]]:
    """Share constants between two passes with the same parameters and inputs.

    The first pass computes each norm where it is needed, with the product of the tokens
    if that is faster, and the second pass uses these norms. Norms that are held already
    are not shared. Of few tokens, the output of the last layer is shared too
    (`SharedPass`).

    Args:
        layers: The layers, in the same order for both passes.
        known: What the first pass kept, for the second; empty for the first.

    Yields:
        What is kept, by the position of the layer; complete on exit.
    """
    places = {str(i): layer for i, layer in enumerate(layers)}
    free = {place: layer for place, layer in places.items() if "_norm" not in layer}
    shared = SharedPass()
    kept: dict[str, mx.array] = {}
    for place, layer in places.items():
        layer._shared = shared
        if place in known and place in free:
            layer._norm = known[place]
        if (output := known.get(place + _OUTPUT)) is not None:
            shared.known[id(layer)] = output
    try:
        yield kept
        if (last := shared.last()) is not None:
            place = next(p for p, layer in places.items() if layer is last[0])
            kept[place + _OUTPUT] = last[1]
    finally:
        for layer in layers:
            layer._shared = None
        for place, layer in free.items():
            if "_norm" in layer:
                kept[place] = layer.pop("_norm")


def _gather_norms(layers: list[DoRALayer]) -> None:
    """Hold the norms of layers over divided weights, gathered in one message."""
    own = [layer.own_norm() for layer in layers]
    ends = np.cumsum([norm.size for norm in own]).tolist()
    first = weight_of(layers[0].base)
    assert isinstance(first, ShardedWeight)
    every = first.gathered(mx.concatenate(own)[None])
    norms = [
        mx.contiguous(norm.reshape(-1)) for norm in mx.split(every, ends[:-1], axis=1)
    ]
    mx.eval(norms)
    for layer, norm in zip(layers, norms, strict=True):
        layer._norm = norm


def _sum_norms(layers: list[DoRALayer]) -> None:
    """Hold the norms of layers whose columns are divided, summed in one message."""
    weights = [weight_of(layer.base) for layer in layers]
    updates = [layer.adapted().update for layer in layers]
    parts = [
        own_inner(weight, update)
        for weight, update in zip(weights, updates, strict=True)
        if isinstance(weight, ShardedWeight)
    ]
    ends = np.cumsum([part.size for part in parts]).tolist()
    assert isinstance(weights[0], ShardedWeight)
    every = mx.split(weights[0].summed(mx.concatenate(parts)), ends[:-1])
    norms = [
        norm_by_columns(update, layer["_squared_base"], inner)
        for layer, update, inner in zip(layers, updates, every, strict=True)
    ]
    mx.eval(norms)
    for layer, norm in zip(layers, norms, strict=True):
        layer._norm = norm
