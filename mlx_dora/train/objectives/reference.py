"""The reference policy: the model without its adapter, or with an earlier one.

It shares the model's weights: `Reference.standing_in` puts it in the model's place for
a forward pass.
"""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_dora.adapters.attach import attach_adapter
from mlx_dora.adapters.config import DoRAConfig
from mlx_dora.adapters.files import read_adapter
from mlx_dora.adapters.surgery import adapter_layers, base_of, disabled, put_modules
from mlx_dora.errors import DoRAError


class Reference:
    """The model with its adapter disabled.

    Attributes:
        identity: Text that differs between references of the same base model.
    """

    identity: str = "base"

    def standing_in(self, model: nn.Module) -> AbstractContextManager[None]:
        """Make the model behave as the reference during the block."""
        return disabled(model)


class StartingWeights(Reference):
    """The weights that full fine-tuning changes, as they were.

    Args:
        model: The model, made trainable, before its first step.
    """

    def __init__(self, model: nn.Module) -> None:
        self._weights = _trainable(model)

    def standing_in(self, model: nn.Module) -> AbstractContextManager[None]:
        """Make the model behave as the reference during the block."""
        return _with_weights(model, self._weights)


class EarlierAdapter(Reference):
    """The base model with a saved adapter.

    Args:
        model: The base model, or a model adapted from it; unchanged afterward.
        path: Folder of the adapter.

    Raises:
        DoRAError: If the adapter cannot be read, changes the full weights, or does not
            fit the model.
    """

    def __init__(self, model: nn.Module, path: str) -> None:
        adapter = read_adapter(path)
        if adapter.fine_tune_type == "full":
            raise DoRAError(
                f"reference_adapter {path} holds full weights, not an adapter: fuse it "
                "and train from the fused model, whose base is then the reference."
            )
        present = adapter_layers(model)
        bases = [(at, base_of(layer)) for at, layer in present]
        put_modules(model, bases)
        try:
            attach_adapter(model, adapter, name=f"reference_adapter {path}")
            self._layers = adapter_layers(model)
            put_modules(model, [(at, base_of(layer)) for at, layer in self._layers])
        finally:
            put_modules(model, present)
        for _, layer in self._layers:
            layer.eval()
        self.identity = _digest(adapter.tensors, adapter.config)

    def standing_in(self, model: nn.Module) -> AbstractContextManager[None]:
        """Make the model behave as the reference during the block."""
        return _with_layers(model, self._layers)


@contextmanager
def _with_layers(model: nn.Module, layers: list[tuple[str, Any]]) -> Iterator[None]:
    own = adapter_layers(model)
    others = {path for path, _ in own} - {path for path, _ in layers}
    try:
        put_modules(model, [(at, base_of(layer)) for at, layer in own if at in others])
        put_modules(model, layers)
        yield
    finally:
        put_modules(model, [(path, base_of(layer)) for path, layer in layers])
        put_modules(model, own)


@contextmanager
def _with_weights(model: nn.Module, weights: dict[str, mx.array]) -> Iterator[None]:
    own = _trainable(model)
    try:
        model.load_weights(list(weights.items()), strict=False)
        yield
    finally:
        model.load_weights(list(own.items()), strict=False)


def _digest(tensors: Mapping[str, mx.array], config: DoRAConfig) -> str:
    """Hash an adapter's tensors and its multipliers."""
    total = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        total.update(f"{name} {value.shape} {config.scale_of(name)} ".encode())
        total.update(np.array(value.astype(mx.float32)).tobytes())
    return f"sha256:{total.hexdigest()}"


def _trainable(model: nn.Module) -> dict[str, mx.array]:
    flat: Any = tree_flatten(model.trainable_parameters())
    return dict(flat)
