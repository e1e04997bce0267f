"""Handles base weights that PEFT saved with an adapter; drops equal copies."""

import logging
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from mlx_dora.adapters.adapter import listed
from mlx_dora.adapters.fingerprint import base_tensors
from mlx_dora.adapters.keys import shortened
from mlx_dora.peft.tensors import PREFIX

HEADS = ("lm_head", "embed_out", "output")
"""Name of the output layer; a model without it uses its embeddings as output layer."""

_DIFFERENT = "weights of the base that differ from the model's:"
_PACKED = (
    "weights that cannot be compared with the model's, which are packed (give the "
    "model in full precision):"
)
_TIED = (
    "copies of a head that differ from the embeddings, to which this model ties its "
    "head:"
)

logger = logging.getLogger(__name__)


def take_copies(raw: dict[str, mx.array]) -> dict[str, mx.array]:
    """Remove the base's own weights from PEFT's tensors and return them."""
    names = [n for n in raw if n.endswith(".weight") and "lora_" not in n]
    return {name: raw.pop(name) for name in names}


def copy_problems(
    copies: dict[str, mx.array],
    model: nn.Module | None,
    path_of: Callable[[str], str],
) -> list[str]:
    """Compare copies of base weights with the model's own weights.

    Equal copies can be dropped and are logged. PEFT's ``save_embedding_layers`` also
    saves the head of a tied model, which is compared with the embeddings.

    Args:
        copies: The copies, by PEFT's names.
        model: The base model; None if no copy can be compared.
        path_of: Maps PEFT's path of a module to the model's path.

    Returns:
        The problems; empty if every copy can be dropped.
    """
    if model is None:
        what = "weights of the base (give the model, to compare them with its own):"
        return listed(what, copies)
    weights = base_tensors(model)
    embeddings = [
        module.weight
        for _, module in model.named_modules()
        if isinstance(module, nn.Embedding)
    ]
    problems: dict[str, list[str]] = {}
    equal = []
    for name, copy in copies.items():
        peft_path = name.removeprefix(PREFIX).removesuffix(".weight")
        path = path_of(peft_path.removesuffix(".base_layer"))
        own = weights.get(f"{path}.weight")
        if own is None and path.rpartition(".")[2] in HEADS:
            is_equal = any(_is_equal(copy, embedding) for embedding in embeddings)
            what = ("" if is_equal else _TIED) if embeddings else _PACKED
        elif own is None:
            what = "weights that the model does not have:"
        elif f"{path}.scales" in weights:
            what = _PACKED
        else:
            what = _compared(copy, own)
        if what:
            problems.setdefault(what, []).append(name)
        else:
            equal.append(name)
    if equal:
        logger.warning(
            "left out, since the model has the same: %s",
            shortened(name.removeprefix(PREFIX) for name in equal),
        )
    return [p for what, names in problems.items() for p in listed(what, names)]


def _compared(copy: mx.array, own: mx.array) -> str:
    """Return why a copy cannot be dropped; empty if it can."""
    if copy.shape != own.shape:
        return "weights of the base in another shape than the model's (resized?):"
    return "" if _is_equal(copy, own) else _DIFFERENT


def _is_equal(copy: mx.array, own: mx.array) -> bool:
    if copy.shape != own.shape:
        return False
    return bool(mx.array_equal(own, copy.astype(own.dtype)))
