"""Reads PEFT's ``adapter_config.json`` and checks every value."""

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from mlx_dora.adapters.keys import shortened
from mlx_dora.errors import DoRAError
from mlx_dora.io.json import read_object
from mlx_dora.options import option_problems
from mlx_dora.peft.config import PeftConfig

# Settings that turn a LoRA into another method, or train other parameters beside it.
# Each must be off, absent or empty.
_REFUSED = {
    "modules_to_save": "whole modules trained beside the adapter",
    "trainable_token_indices": "single tokens trained beside the adapter",
    "target_parameters": "adapters on bare parameters, such as experts",
    "layer_replication": "layers used twice",
    "lora_bias": "a bias in the low-rank branch",
    "alora_invocation_tokens": "adapters that start at a token (aLoRA)",
    "use_qalora": "QA-LoRA",
    "use_bdlora": "block-diagonal LoRA",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
    "megatron_config": "Megatron's parallel layers",
}
# All other values change the base at the start, and the adapter fits only that base.
_HARMLESS_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
_READ = {"peft_type", "bias", "init_lora_weights"}
_READ |= {field.name for field in fields(PeftConfig)}
# Settings that do not affect the output of a saved adapter.
_WITHOUT_EFFECT = {
    "task_type",
    "auto_mapping",
    "peft_version",
    "revision",
    "inference_mode",
    "fan_in_fan_out",
    "megatron_core",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "qalora_group_size",
    "runtime_config",
    "ensure_weight_tying",
    "unsloth_fixed",
}
# A repeated group that contains a repeat or a choice; matching it can take forever.
_ENDLESS = re.compile(r"\((?:[^()\\]|\\.)*[*+}|](?:[^()\\]|\\.)*\)[*+{]")

logger = logging.getLogger(__name__)


def read_peft_config(path: Path) -> PeftConfig:
    """Read PEFT's ``adapter_config.json``.

    Warns about unknown keys that have a value.

    Raises:
        DoRAError: If the file is not a LoRA or DoRA config, requests something that a
            plain adapter cannot express, or has bad values; names all problems.
    """
    content = read_object(path)
    if "peft_type" not in content:
        raise DoRAError(f"{path} is not a PEFT config: it has no peft_type.")
    if problems := list(_unsupported(content)):
        raise DoRAError(
            f"{path} has settings that a plain adapter cannot express: "
            f"{'; '.join(problems)}."
        )
    config = PeftConfig(**_given(content))
    if problems := [*option_problems(config), *_bad_expressions(config)]:
        raise DoRAError(f"{path}: {'; '.join(problems)}.")
    if unknown := [key for key in content if content[key] and not _is_known(key)]:
        logger.warning(
            "%s has keys that mlx_dora does not know and ignores: %s",
            path,
            shortened(unknown),
        )
    return config


def _is_known(key: str) -> bool:
    return key in _READ or key in _WITHOUT_EFFECT or key in _REFUSED


def _unsupported(content: Mapping[str, Any]) -> Iterable[str]:
    kind = content["peft_type"]
    if kind != "LORA":
        yield f"peft_type {kind!r:.40} (LORA is supported, with or without use_dora)"
        return
    for key, meaning in _REFUSED.items():
        if content.get(key):
            yield f"{key} = {content[key]!r:.80} ({meaning})"
    for key, value in content.items():
        if key.startswith("use_") and value and not _is_known(key):
            yield (
                f"{key} = {value!r:.80} (unknown to mlx_dora; it may change the "
                "adapter's output)"
            )
    if (content.get("bias") or "none") != "none":
        yield f"bias = {content['bias']!r:.40} (trained biases of the base)"
    start = content.get("init_lora_weights", True)
    if start not in _HARMLESS_STARTS:
        yield (
            f"init_lora_weights = {start!r:.40} (the adapter fits a base that was "
            "changed at the start; save it with PEFT's "
            "path_initial_model_for_weight_conversion)"
        )


def _given(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of our fields; null and "" stand for PEFT's default."""
    given = {
        field.name: content[field.name]
        for field in fields(PeftConfig)
        if field.name in content
    }
    numbers = ("r", "lora_alpha")  # null is not valid
    return {"rank_pattern": {}, "alpha_pattern": {}} | {
        name: value
        for name, value in given.items()
        if value not in (None, "") or name in numbers
    }


def _bad_expressions(config: PeftConfig) -> Iterable[str]:
    for key, text, expression in config.expressions():
        try:
            re.compile(expression)
        except (re.error, RecursionError, OverflowError) as error:
            hint = f": write {'.*' + text[1:]!r:.60}" if text.startswith("*") else ""
            yield (
                f"{key} {text!r:.60} is not a regular expression ({error}), which PEFT "
                f"requires{hint}"
            )
            continue
        if _ENDLESS.search(text):
            yield (
                f"{key} {text!r:.60} repeats a group that contains a repeat or choice; "
                "matching it could take forever"
            )
