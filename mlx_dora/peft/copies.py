"""Weights of the base that PEFT saved along: left out if the model has them anyway."""

import logging
from collections.abc import Callable, Iterable

import mlx.core as mx
import mlx.nn as nn

from mlx_dora.adapters.adapter import listed
from mlx_dora.adapters.fingerprint import base_tensors
from mlx_dora.adapters.keys import shortened
from mlx_dora.peft.tensors import PREFIX

HEADS = ("lm_head", "embed_out", "output")
"""What models call their output layer; a model without it ties it to its embeddings."""

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
    """Take the base's own weights out of PEFT's tensors, and return them."""
    names = [n for n in raw if n.endswith(".weight") and "lora_" not in n]
    return {name: raw.pop(name) for name in names}


def copy_problems(
    copies: dict[str, mx.array],
    model: nn.Module | None,
    path_of: Callable[[str], str],
) -> list[str]:
    """Compare copies of the base's weights with the model's own.

    Those that are equal can go, and are logged. PEFT's ``save_embedding_layers`` saves
    the head of a tied model too; it is compared with the embeddings.

    Args:
        copies: PEFT's names to arrays.
        model: The base; without it, no copy can be compared.
        path_of: From PEFT's path of a module to the model's.

    Returns:
        What is wrong; empty if every copy can be left out.
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
            what = _compared_when_tied(copy, embeddings) if embeddings else _PACKED
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
    """What keeps a copy from being left out; empty if nothing."""
    if copy.shape != own.shape:
        return "weights of the base in another shape than the model's (resized?):"
    return "" if _is_equal(copy, own) else _DIFFERENT


def _compared_when_tied(copy: mx.array, embeddings: Iterable[mx.array]) -> str:
    if any(_is_equal(copy, own) for own in embeddings):
        return ""
    return _TIED


def _is_equal(copy: mx.array, own: mx.array) -> bool:
    if copy.shape != own.shape:
        return False
    return bool(mx.array_equal(own, copy.astype(own.dtype)))
