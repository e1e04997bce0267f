"""What PEFT's ``adapter_config.json`` asks for, and which modules it means."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

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
        patterns = [layer_expression(name) for name in self.layers_pattern]
        for pattern in patterns or [r".*?\.[^.]*\.(\d+)\."]:
            if found := re.match(pattern, path):
                return int(found[1]) in self.layers_to_transform
        return False


def key_expression(key: str) -> str:
    """The regular expression that PEFT makes of a key of a pattern."""
    return rf"(.*\.)?({key})$"


def layer_expression(name: str) -> str:
    """The regular expression that PEFT makes of an entry of ``layers_pattern``."""
    return rf"(?:^|.*?\.){name}\.(\d+)\."


def _matching(pattern: Mapping[str, Any], path: str, default: Any) -> Any:
    """The entry of the first key that fits `path`, by PEFT's rule."""
    for key, value in pattern.items():
        if re.match(key_expression(key), path):
            return value
    return default


def _is_named(names: Iterable[str] | str, path: str) -> bool:
    """A text is a regular expression for the whole path, a list holds its endings."""
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in names)
