"""Says which hosts cannot load a saved adapter, and why."""

import logging

import mlx.core as mx
import mlx.nn as nn

from mlx_dora.adapters.adapter import Adapter
from mlx_dora.adapters.key_form import kept_form, key_form
from mlx_dora.adapters.keys import shortened
from mlx_dora.adapters.surgery import adapter_layers, base_of

STOCK = "stock mlx-lm"
SWIFT = "mlx-swift-lm"

logger = logging.getLogger(__name__)


def warn_of_hosts(model_or_adapter: nn.Module | Adapter, adapter: Adapter) -> None:
    """Warn about modules of this adapter that a host cannot load, by host and reason.

    Args:
        model_or_adapter: What is saved; a model also shows the classes of its modules.
        adapter: The adapter in it.
    """
    if adapter.fine_tune_type == "full":
        return
    if adapter.fine_tune_type == "dora":
        for reason, paths in _stock_reasons(model_or_adapter, adapter).items():
            logger.warning(
                "%s cannot run DoRA on %s; use mlx_dora.load or use_in_mlx_lm for: %s",
                STOCK,
                reason,
                ", ".join(paths),
            )
    for reason in swift_reasons(model_or_adapter, adapter):
        logger.warning("%s (iOS, macOS) cannot load this adapter: %s", SWIFT, reason)


def _stock_reasons(
    model_or_adapter: nn.Module | Adapter, adapter: Adapter
) -> dict[str, list[str]]:
    reasons: dict[str, list[str]] = {}
    for name, value in adapter.tensors.items():
        # A zero row of the base has m = 0, which training does not change.
        if name.endswith(".m") and mx.any(value == 0):
            reasons.setdefault("zero rows (it computes NaN)", []).append(name[:-2])
        if name.endswith(".m") and value.ndim > 1:
            stacks = reasons.setdefault("experts or heads of latent attention", [])
            stacks.append(name[:-2])
    if isinstance(model_or_adapter, nn.Module):
        for path, layer in adapter_layers(model_or_adapter):
            base = base_of(layer)
            if isinstance(base, nn.QuantizedEmbedding):
                reasons.setdefault("quantized embeddings", []).append(path)
            elif isinstance(base, nn.QuantizedLinear) and base.bits in (3, 5, 6):
                reasons.setdefault("3-, 5- or 6-bit bases", []).append(path)
    return reasons


def swift_reasons(model_or_adapter: nn.Module | Adapter, adapter: Adapter) -> list[str]:
    """Return why mlx-swift-lm cannot load an adapter; empty if it can.

    It adapts linear layers, dense or quantized, whose names relative to one of the last
    ``num_layers`` blocks are among the keys, and refuses a file with other tensors.
    """
    reasons = []
    if isinstance(model_or_adapter, nn.Module):
        why = key_form(model_or_adapter, adapter.paths).why_full
    else:
        why = kept_form(adapter.config, adapter.paths).why_full
    if why:
        reasons.append(why)
    stacks = [
        name.removesuffix(".lora_a")
        for name, value in adapter.tensors.items()
        if name.endswith(".lora_a") and value.ndim > 2
    ]
    if stacks:
        reasons.append(
            f"experts or heads of latent attention are adapted: {shortened(stacks)}"
        )
    zero = [
        name.removesuffix(".m")
        for name, value in adapter.tensors.items()
        if name.endswith(".m") and value.ndim == 1 and mx.any(value == 0)
    ]
    if zero:
        reasons.append(f"it computes NaN on zero rows: {shortened(zero)}")
    return reasons
