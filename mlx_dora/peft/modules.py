"""Matches modules of a PEFT adapter to modules of an MLX model."""

from collections.abc import Iterable

import mlx.nn as nn

from mlx_dora.adapters.adapter import listed
from mlx_dora.adapters.keys import near_names
from mlx_dora.peft.classes import ClassNames
from mlx_dora.peft.config import PeftConfig
from mlx_dora.peft.copies import HEADS
from mlx_dora.peft.names import class_of, names_of

_LINEARS = (nn.Linear, nn.QuantizedLinear)
# Prefixes that transformers and mlx-lm put before the same blocks.
_CONTAINERS = {"model", "language_model", "text_model", "transformer", "backbone"}


class ModelModules:
    """The modules of a model, looked up by PEFT's paths."""

    def __init__(self, model: nn.Module) -> None:
        self.names = names_of(class_of(model)) or ClassNames()
        self._modules = {path: m for path, m in model.named_modules() if path}
        self._inside: dict[str, list[str]] = {}
        for path in self._modules:
            self._inside.setdefault(_within_containers(path), []).append(path)

    def candidates(self, peft_path: str) -> list[str]:
        """Return the model's paths that may correspond to PEFT's path."""
        for path in (self.names.to_mlx(peft_path), peft_path):
            if path in self._modules:
                return [path]
        inner = _within_containers(peft_path)
        return self._inside.get(inner, []) or self._inside.get(
            _within_containers(self.names.to_mlx(peft_path)), []
        )

    def path_of(self, peft_path: str) -> str:
        """Return the model's path, or PEFT's if it matches no or several modules."""
        paths = self.candidates(peft_path)
        return paths[0] if len(paths) == 1 else peft_path

    def match(
        self, config: PeftConfig, peft_paths: Iterable[str]
    ) -> tuple[dict[str, str], list[str]]:
        """Return a map from PEFT's paths to the model's, and all problems."""
        names: dict[str, str] = {}
        problems = []
        for peft_path in peft_paths:
            paths = self.candidates(peft_path)
            if len(paths) != 1:
                problems.append(self._unmatched(peft_path, len(paths)))
            elif not isinstance(self._modules[paths[0]], _LINEARS):
                kind = type(self._modules[paths[0]]).__name__
                problems.append(f"{paths[0]} is of class {kind}, not a linear layer")
            elif paths[0] in names.values():
                problems.append(f"{peft_path} and another module are both {paths[0]}")
            else:
                names[peft_path] = paths[0]
        if problems or not config.names_targets:
            return names, problems
        matched = set(names.values())
        without = [
            path
            for path, module in self._modules.items()
            if isinstance(module, _LINEARS)
            and path not in matched
            and config.targets(self.names.to_transformers(path))
        ]
        return names, listed("target_modules names what has no tensors:", without)

    def _unmatched(self, peft_path: str, count: int) -> str:
        if count:
            return f"{count} modules of the model match {peft_path}"
        if peft_path.rpartition(".")[2] in HEADS:
            return (
                f"{peft_path} does not exist: this model ties its head to its "
                "embeddings"
            )
        theirs = [self.names.to_transformers(path) for path in self._modules]
        return (
            f"no module of the model matches {peft_path}{near_names(peft_path, theirs)}"
        )


def _within_containers(path: str) -> str:
    """Return the path without first parts that only wrap a language model."""
    parts = path.split(".")
    start = next((i for i, p in enumerate(parts) if p not in _CONTAINERS), 0)
    return ".".join(parts[start:])
