"""Which module of an MLX model each module of a PEFT adapter is."""

from collections.abc import Iterable

import mlx.nn as nn

from mlx_dora.adapters.adapter import listed
from mlx_dora.adapters.keys import near_names
from mlx_dora.peft.classes import ClassNames
from mlx_dora.peft.config import PeftConfig
from mlx_dora.peft.copies import HEADS
from mlx_dora.peft.names import class_of, names_of

_LINEARS = (nn.Linear, nn.QuantizedLinear)
# What transformers and mlx-lm put around the same blocks.
_CONTAINERS = {"model", "language_model", "text_model", "transformer", "backbone"}


class ModelModules:
    """The modules of a model, found by the paths that PEFT has for them."""

    def __init__(self, model: nn.Module) -> None:
        self.names = names_of(class_of(model)) or ClassNames()
        self._modules = {path: m for path, m in model.named_modules() if path}
        self._inside: dict[str, list[str]] = {}
        for path in self._modules:
            self._inside.setdefault(_within_containers(path), []).append(path)

    def candidates(self, peft_path: str) -> list[str]:
        """The model's paths that PEFT's path can mean; best is one."""
        for path in (self.names.to_mlx(peft_path), peft_path):
            if path in self._modules:
                return [path]
        inner = _within_containers(peft_path)
        return self._inside.get(inner, []) or self._inside.get(
            _within_containers(self.names.to_mlx(peft_path)), []
        )

    def path_of(self, peft_path: str) -> str:
        """The model's path, or PEFT's if it means no module or several."""
        found = self.candidates(peft_path)
        return found[0] if len(found) == 1 else peft_path

    def match(
        self, config: PeftConfig, peft_paths: Iterable[str]
    ) -> tuple[dict[str, str], list[str]]:
        """Return PEFT's path of each module to the model's, and all problems."""
        names: dict[str, str] = {}
        problems = []
        for peft_path in peft_paths:
            found = self.candidates(peft_path)
            if len(found) != 1:
                problems.append(self._unmatched(peft_path, len(found)))
            elif not isinstance(self._modules[found[0]], _LINEARS):
                kind = type(self._modules[found[0]]).__name__
                problems.append(f"{found[0]} is of class {kind}, not a linear layer")
            elif found[0] in names.values():
                problems.append(f"{peft_path} and another module are both {found[0]}")
            else:
                names[peft_path] = found[0]
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
            return f"{count} modules of the model can be {peft_path}"
        if peft_path.rpartition(".")[2] in HEADS:
            return (
                f"{peft_path} has no place: this model ties its head to its embeddings"
            )
        theirs = [self.names.to_transformers(path) for path in self._modules]
        return (
            f"no module of the model can be {peft_path}{near_names(peft_path, theirs)}"
        )


def _within_containers(path: str) -> str:
    """The path without the first parts that only wrap a language model."""
    parts = path.split(".")
    start = next((i for i, p in enumerate(parts) if p not in _CONTAINERS), 0)
    return ".".join(parts[start:])
