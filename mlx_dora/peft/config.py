"""The settings in PEFT's ``adapter_config.json``, and the modules they select."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mlx_dora.options import option

_ALL_LINEAR = "all-linear"


@dataclass(frozen=True, kw_only=True)
class PeftConfig:
    """The fields of a PEFT LoRA or DoRA config that we use, with PEFT's defaults."""

    r: int = option(8, help="Rank.", least=1)
    lora_alpha: float = option(8, help="Numerator of the multiplier.")
    use_dora: bool = option(False, help="Whether the adapter has magnitudes.")
    use_rslora: bool = option(False, help="Divide alpha by √r instead of r.")
    lora_dropout: float = option(0.0, help="Dropout.", least=0, below=1)
    rank_pattern: dict[str, int] = option(help="Ranks of modules.", least=1)
    alpha_pattern: dict[str, float] = option(help="Alphas of modules.")
    target_modules: str | tuple[str, ...] = option((), help="Adapted modules.")
    exclude_modules: str | tuple[str, ...] = option((), help="Modules left out.")
    layers_to_transform: tuple[int, ...] | int = option((), help="Adapted blocks.")
    layers_pattern: str | tuple[str, ...] = option((), help="Names before numbers.")
    base_model_name_or_path: str | None = option(None, help="Name of the base.")

    def rank_of(self, path: str) -> int:
        """Return the rank that PEFT uses for the module at `path`."""
        return _matching(self.rank_pattern, path, self.r)

    def scale_of(self, path: str) -> float:
        """Return the multiplier of the update at `path`: alpha / r, or alpha / √r."""
        rank = self.rank_of(path)
        alpha = _matching(self.alpha_pattern, path, self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def targets(self, path: str) -> bool:
        """Whether PEFT adapts the module at `path`, if PEFT supports its class.

        ``"all-linear"`` matches every module.
        """
        if _is_named(self.exclude_modules, path):
            return False
        if not self.names_targets:
            return True
        if isinstance(self.target_modules, str) or path in self.target_modules:
            return _is_named(self.target_modules, path)
        return _is_named(self.target_modules, path) and self._is_in_layers(path)

    @property
    def names_targets(self) -> bool:
        """Whether the config names modules instead of leaving the choice to PEFT."""
        return self.target_modules not in ((), [], "", _ALL_LINEAR)

    def _is_in_layers(self, path: str) -> bool:
        layers, names = self.layers_to_transform, self.layers_pattern
        layers = [layers] if isinstance(layers, int) else layers
        if not layers:
            return True
        names = [names] if isinstance(names, str) else names
        patterns = [layer_expression(name) for name in names if name]
        for pattern in patterns or [r".*?\.[^.]*\.(\d+)\."]:
            if match := re.match(pattern, path):
                return int(match[1]) in layers
        return False

    def expressions(self) -> Iterator[tuple[str, str, str]]:
        """Yield each regular expression: its field, its text and what PEFT makes.

        Skips values of a wrong type.
        """
        for field in ("rank_pattern", "alpha_pattern"):
            pattern = getattr(self, field)
            for key in pattern if isinstance(pattern, dict) else ():
                yield field, key, key_expression(key)
        for field in ("target_modules", "exclude_modules"):
            if isinstance(text := getattr(self, field), str):
                yield field, text, text
        names = self.layers_pattern
        for name in names if isinstance(names, list | tuple) else [names]:
            if isinstance(name, str):
                yield "layers_pattern", name, layer_expression(name)


def key_expression(key: str) -> str:
    """Return the regular expression that PEFT forms from a pattern's key."""
    return rf"(.*\.)?({key})$"


def layer_expression(name: str) -> str:
    """Return the regular expression that PEFT forms from a ``layers_pattern`` entry."""
    return rf"(?:^|.*?\.){name}\.(\d+)\."


def _matching(pattern: Mapping[str, Any], path: str, default: Any) -> Any:
    """Return the entry of the first key that matches `path` by PEFT's rule."""
    for key, value in pattern.items():
        if re.match(key_expression(key), path):
            return value
    return default


def _is_named(names: Iterable[str] | str, path: str) -> bool:
    """Whether `names`, a regular expression or a list of endings, matches `path`."""
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in names)
