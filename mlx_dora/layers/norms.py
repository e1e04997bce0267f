"""Computes all norms of a model once per step."""

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.nn as nn

from mlx_dora.layers._layer import DoRALayer


@contextmanager
def held_norms(model: nn.Module) -> Iterator[None]:
    """Compute every adapted norm on entry and reuse it until exit.

    Norms depend only on the parameters. One computation therefore serves all
    micro-batches of a step and the recomputed forward passes of gradient checkpointing.
    Leave the context before the optimizer changes the parameters.
    """
    layers = [m for m in model.modules() if isinstance(m, DoRALayer)]
    for layer in layers:
        layer.hold_norm()
    try:
        yield
    finally:
        for layer in layers:
            layer.release_norm()
