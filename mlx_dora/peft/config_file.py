"""Reads PEFT's ``adapter_config.json`` and checks every value."""

import logging
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mlx_dora.adapters.keys import shortened
from mlx_dora.errors import DoRAError
from mlx_dora.io.json import read_object
from mlx_dora.peft.config import PeftConfig, key_expression, layer_expression

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
_READ = {
    "peft_type",
    "r",
    "lora_alpha",
    "use_dora",
    "use_rslora",
    "lora_dropout",
    "rank_pattern",
    "alpha_pattern",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "base_model_name_or_path",
    "bias",
    "init_lora_weights",
}
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
    values = _Values(content)
    config = _parse(values)
    if values.problems:
        raise DoRAError(f"{path}: {'; '.join(values.problems)}.")
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


class _Values:
    """The values of a config, each checked when it is read.

    Attributes:
        problems: Problems with the values read so far.
    """

    def __init__(self, content: Mapping[str, Any]) -> None:
        self._content = content
        self.problems: list[str] = []

    def _wrong(self, key: str, expected: str, value: Any) -> None:
        self.problems.append(f"{key} must be {expected}, got {value!r:.60}")

    def rank(self, key: str, value: Any) -> int:
        if type(value) is not int or value < 1:
            self._wrong(key, "a whole number of at least 1", value)
            return 1
        return value

    def number(self, key: str, value: Any, limit: float = math.inf) -> float:
        """Return a finite number; with a limit, it must be at least 0 and below it."""
        is_number = type(value) is int or type(value) is float
        lowest = -math.inf if limit == math.inf else 0
        try:
            if is_number and math.isfinite(value) and lowest <= value < limit:
                return float(value)
        except OverflowError:  # an integer too large for a float
            pass
        expected = (
            "a finite number" if limit == math.inf else f"from 0 to below {limit}"
        )
        self._wrong(key, expected, value)
        return 0.0

    def flag(self, key: str) -> bool:
        value = self._content.get(key)
        if value is not None and type(value) is not bool:
            self._wrong(key, "true or false", value)
        return value is True

    def text(self, key: str) -> str | None:
        value = self._content.get(key)
        return value if isinstance(value, str) and value else None

    def get(self, key: str, default: Any) -> Any:
        """Return the value, or the default if the key is absent."""
        return self._content.get(key, default)

    def names(self, key: str) -> tuple[str, ...] | str:
        """Return a regular expression or names; no names if the key is absent."""
        names = self._texts(key)
        if isinstance(names, str) and not self._is_expression(key, names, names):
            return ()
        return names

    def _texts(self, key: str) -> tuple[str, ...] | str:
        value = self._content.get(key) or ()
        if isinstance(value, str):
            return value
        if not isinstance(value, list | tuple) or not all(
            isinstance(name, str) for name in value
        ):
            self._wrong(key, "a text or a list of texts", value)
            return ()
        return tuple(value)

    def layers(self, key: str) -> tuple[int, ...]:
        value = self._content.get(key)
        layers = [value] if type(value) is int else value or []
        if not isinstance(layers, list) or any(type(n) is not int for n in layers):
            self._wrong(key, "a layer number or a list of layer numbers", value)
            return ()
        return tuple(layers)

    def pattern(self, key: str) -> dict[str, Any]:
        """Return a pattern's entries, whose keys must be usable regular expressions."""
        value = self._content.get(key) or {}
        if not isinstance(value, dict):
            self._wrong(key, "an object that maps module names to values", value)
            return {}
        return {
            name: entry
            for name, entry in value.items()
            if self._is_expression(key, name, key_expression(name))
        }

    def layer_names(self, key: str) -> tuple[str, ...]:
        names = self._texts(key)
        return tuple(
            name
            for name in ((names,) if isinstance(names, str) else names)
            if self._is_expression(key, name, layer_expression(name))
        )

    def _is_expression(self, key: str, text: str, expression: str) -> bool:
        try:
            re.compile(expression)
        except (re.error, RecursionError, OverflowError) as error:
            hint = f": write {'.*' + text[1:]!r:.60}" if text.startswith("*") else ""
            self.problems.append(
                f"{key} {text!r:.60} is not a regular expression ({error}), which PEFT "
                f"requires{hint}"
            )
            return False
        if _ENDLESS.search(text):
            self.problems.append(
                f"{key} {text!r:.60} repeats a group that contains a repeat or choice; "
                "matching it could take forever"
            )
            return False
        return True


def _parse(values: _Values) -> PeftConfig:
    return PeftConfig(
        r=values.rank("r", values.get("r", 8)),  # PEFT's defaults
        lora_alpha=values.number("lora_alpha", values.get("lora_alpha", 8)),
        use_dora=values.flag("use_dora"),
        use_rslora=values.flag("use_rslora"),
        lora_dropout=values.number(
            "lora_dropout", values.get("lora_dropout", None) or 0.0, limit=1
        ),
        rank_pattern={
            name: values.rank(f"rank_pattern {name!r:.60}", value)
            for name, value in values.pattern("rank_pattern").items()
        },
        alpha_pattern={
            name: values.number(f"alpha_pattern {name!r:.60}", value)
            for name, value in values.pattern("alpha_pattern").items()
        },
        target_modules=values.names("target_modules") or None,
        exclude_modules=values.names("exclude_modules"),
        layers_to_transform=values.layers("layers_to_transform"),
        layers_pattern=values.layer_names("layers_pattern"),
        base_model_name_or_path=values.text("base_model_name_or_path"),
    )
