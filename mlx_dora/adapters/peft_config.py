"""PEFT's ``adapter_config.json``: what it asks for, and which modules it means."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_dora.adapters.adapter import Adapter
from mlx_dora.adapters.peft_values import value_problems
from mlx_dora.errors import DoRAError
from mlx_dora.io.json import read_object

# What makes of a LoRA something else, or trains other parameters beside it. Each must
# be off, absent or empty.
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
# The others start by changing the base, and the adapter fits the changed base alone.
_HARMLESS_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
_ALL_LINEAR = "all-linear"


@dataclass(frozen=True, kw_only=True)
class PeftConfig:
    """What we need of a PEFT LoRA or DoRA config; the fields have PEFT's names."""

    r: int
    lora_alpha: float
    use_dora: bool
    use_rslora: bool
    lora_dropout: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    target_modules: tuple[str, ...] | str | None
    exclude_modules: tuple[str, ...] | str
    layers_to_transform: tuple[int, ...]
    layers_pattern: tuple[str, ...]
    base_model_name_or_path: str | None

    def rank_of(self, path: str) -> int:
        """The rank that PEFT would give the module at `path`."""
        return _matching(self.rank_pattern, path, self.r)

    def scale_of(self, path: str) -> float:
        """The multiplier of the update at `path`: alpha / r, or alpha / √r."""
        rank = self.rank_of(path)
        alpha = _matching(self.alpha_pattern, path, self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def targets(self, path: str) -> bool:
        """Whether PEFT would adapt the module at `path`, if it is of a fitting class.

        ``"all-linear"`` is taken to mean every module.
        """
        if _is_named(self.exclude_modules, path):
            return False
        if self.target_modules in (None, _ALL_LINEAR):
            return True
        assert self.target_modules is not None
        if isinstance(self.target_modules, str) or path in self.target_modules:
            return _is_named(self.target_modules, path)
        return _is_named(self.target_modules, path) and self._is_in_layers(path)

    @property
    def names_targets(self) -> bool:
        """Whether the config names modules, and does not leave them to PEFT."""
        return self.target_modules not in (None, _ALL_LINEAR)

    def _is_in_layers(self, path: str) -> bool:
        if not self.layers_to_transform:
            return True
        patterns = [rf"(?:^|.*?\.){name}\.(\d+)\." for name in self.layers_pattern]
        for pattern in patterns or [r".*?\.[^.]*\.(\d+)\."]:
            if found := re.match(pattern, path):
                return int(found[1]) in self.layers_to_transform
        return False


def read_peft_config(path: Path) -> PeftConfig:
    """Read an ``adapter_config.json`` of PEFT.

    Raises:
        DoRAError: If it is no LoRA or DoRA, or asks for something that a plain adapter
            cannot express; one message with all of it by name.
    """
    content = read_object(path)
    if "peft_type" not in content:
        raise DoRAError(f"{path} is no PEFT config: it has no peft_type.")
    problems = list(_unsupported(content))
    if problems:
        raise DoRAError(
            f"{path} asks for what a plain adapter cannot hold: {'; '.join(problems)}."
        )
    problems = list(value_problems(content))
    if problems:
        raise DoRAError(f"{path}: {'; '.join(problems)}.")
    return _parse(content)


def peft_config_json(adapter: Adapter, base_model: str | None) -> dict[str, Any]:
    """The content of an ``adapter_config.json`` that PEFT reads."""
    config, paths = adapter.config, adapter.paths
    ranks = {path: config.rank_of(path) for path in paths}
    alphas = {path: config.scale_of(path) * ranks[path] for path in paths}
    rank, alpha = max(ranks.values()), max(alphas.values(), key=abs)
    # PEFT takes the first key that a path ends with: all paths, the longest first.
    longest_first = sorted(paths, key=len, reverse=True)
    differ = any(r != rank for r in ranks.values())
    differ = differ or any(a != alpha for a in alphas.values())
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": config.dropout,
        "use_dora": adapter.fine_tune_type == "dora",
        "use_rslora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "target_modules": paths,
        "rank_pattern": {p: ranks[p] for p in longest_first} if differ else {},
        "alpha_pattern": {p: alphas[p] for p in longest_first} if differ else {},
    }


def _matching(pattern: Mapping[str, Any], path: str, default: Any) -> Any:
    """The entry of the first key that fits `path`, by PEFT's rule."""
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", path):
            return value
    return default


def _is_named(names: Iterable[str] | str, path: str) -> bool:
    """A text is a regular expression for the whole path, a list holds its endings."""
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in names)


def _unsupported(content: Mapping[str, Any]) -> Iterable[str]:
    kind = content["peft_type"]
    if kind != "LORA":
        yield f"peft_type {kind!r} (LORA is supported, with or without use_dora)"
        return
    for key, meaning in _REFUSED.items():
        if content.get(key):
            yield f"{key} = {content[key]!r:.80} ({meaning})"
    if content.get("bias", "none") != "none":
        yield f"bias = {content['bias']!r} (trained biases of the base)"
    start = content.get("init_lora_weights", True)
    if not isinstance(start, bool | str | None) or start not in _HARMLESS_STARTS:
        yield (
            f"init_lora_weights = {start!r:.40} (the adapter fits a base that was "
            "changed at the start; save it with PEFT's "
            "path_initial_model_for_weight_conversion)"
        )


def _parse(content: Mapping[str, Any]) -> PeftConfig:
    def names(key: str) -> tuple[str, ...] | str:
        value = content.get(key)
        return value if isinstance(value, str) else tuple(value or ())

    layers, patterns = content.get("layers_to_transform"), names("layers_pattern")
    base = content.get("base_model_name_or_path")
    return PeftConfig(
        r=content.get("r") or 8,  # PEFT's defaults
        lora_alpha=float(8 if (alpha := content.get("lora_alpha")) is None else alpha),
        use_dora=bool(content.get("use_dora")),
        use_rslora=bool(content.get("use_rslora")),
        lora_dropout=float(content.get("lora_dropout") or 0.0),
        rank_pattern=dict(content.get("rank_pattern") or {}),
        alpha_pattern={
            k: float(v) for k, v in (content.get("alpha_pattern") or {}).items()
        },
        target_modules=names("target_modules") or None,
        exclude_modules=names("exclude_modules"),
        layers_to_transform=(layers,)
        if isinstance(layers, int)
        else tuple(layers or ()),
        layers_pattern=(patterns,) if isinstance(patterns, str) else patterns,
        base_model_name_or_path=base if isinstance(base, str) and base else None,
    )
