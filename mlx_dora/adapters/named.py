"""Named adapters of one base, which are swapped and blended without reloading."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from mlx_dora.adapters.adapter import Adapter, overflow_problems
from mlx_dora.adapters.attach import all_problems
from mlx_dora.adapters.files import read_adapter
from mlx_dora.adapters.matrices import adapted_matrices, adapter_tensors
from mlx_dora.adapters.surgery import adapted_already, put_modules
from mlx_dora.errors import DoRAError
from mlx_dora.layers import DoRALayer, dora_class, weight_of
from mlx_dora.matrix.blend import Measured, blend, measured
from mlx_dora.matrix.weight import matrices


@dataclass(frozen=True)
class _Place:
    """A module of the base, and the layer that replaces it when it is adapted."""

    base: nn.Module
    layer: DoRALayer


class NamedAdapters:
    """DoRA and LoRA adapters of one model, by name; none is active at first.

    The active adapter or blend is in the model as ordinary DoRA layers, so `disabled`,
    `fuse_dora` and `save_adapter` work on it. A LoRA adapter is a DoRA adapter whose
    magnitudes equal its norms. The first use of an adapter reads the base's weights
    once to compute its norms; later swaps and blends do not::

        model, tokenizer = load("base")
        adapters = NamedAdapters(model)
        adapters.add("poet", "adapters/poet")
        adapters.add("coder", "adapters/coder")
        adapters.set_adapter("poet")
        adapters.set_adapter({"poet": 0.7, "coder": 0.3})
        adapters.set_adapter(None)  # the base, bit for bit

    Args:
        model: A model without adapters. Do not add adapters to it by other means while
            this object is in use.

    Attributes:
        active: The weights of the active adapters by name; empty for the base.

    Raises:
        DoRAError: If the model has adapters already.
    """

    def __init__(self, model: nn.Module) -> None:
        if problem := adapted_already(model):
            raise DoRAError(f"{problem}, and add the adapter by name.")
        self.active: dict[str, float] = {}
        self._model = model
        self._modules = dict(model.named_modules())  # those of the base
        self._places: dict[str, _Place] = {}
        self._adapters: dict[str, Adapter] = {}
        self._parts: dict[str, dict[str, list[Measured]]] = {}

    @property
    def names(self) -> list[str]:
        """Names of the adapters, in the order in which they were added."""
        return list(self._adapters)

    def add(
        self, name: str, adapter: Adapter | str | Path, *, check_base: bool = True
    ) -> None:
        """Add an adapter without making it active.

        Args:
            name: Name of the adapter.
            adapter: An adapter, its folder, or a Hub id.
            check_base: Refuse an adapter that was trained on a different model.

        Raises:
            DoRAError: If the name is in use, or the adapter does not fit; lists all
                problems.
        """
        if name in self._adapters:
            raise DoRAError(f"there is an adapter named {name!r} already.")
        label = name
        if not isinstance(adapter, Adapter):
            label, adapter = str(adapter), read_adapter(adapter)
        active = self.active
        self._show({})
        try:
            problems = self._problems(adapter, check_base)
        finally:
            self.set_adapter(active)
        if problems:
            raise DoRAError(f"{label} does not fit the model: {'; '.join(problems)}.")
        self._adapters[name] = adapter

    def remove(self, name: str) -> None:
        """Remove an adapter.

        Raises:
            DoRAError: If no adapter has that name, or the adapter is active.
        """
        self._known(name)
        if name in self.active:
            raise DoRAError(f"{name!r} is active; set another adapter first.")
        del self._adapters[name]
        self._parts.pop(name, None)

    def set_adapter(self, which: str | Mapping[str, float] | None) -> None:
        """Activate an adapter, a blend of several, or none.

        A blend is exactly W0 + Σ wᵢ (Wᵢ − W0) of the adapted weights, for any ranks and
        scales. A single adapter with weight 1 is reproduced bit for bit.

        Args:
            which: A name, weights by name, or None for the base.

        Raises:
            DoRAError: If there is no such adapter, or the weights cancel a row of the
                base. The active adapters are unchanged.
        """
        weights = {which: 1.0} if isinstance(which, str) else dict(which or {})
        for name in weights:
            self._known(name)
        weights = {name: float(w) for name, w in weights.items() if w}
        taken: dict[str, tuple[mx.array, mx.array, mx.array, float, mx.array]] = {}
        for path in self._paths(weights):
            here = [
                (weight, self._matrices(name, path))
                for name, weight in weights.items()
                if f"{path}.lora_a" in self._adapters[name].tensors
            ]
            try:
                taken[path] = self._terms(path, here)
            except DoRAError as error:
                raise DoRAError(f"{path}: {error}") from error
        for path, values in taken.items():
            self._places[path].layer.take(*values)
        self._show(taken)
        self.active = weights

    def layers(self, name: str) -> dict[str, DoRALayer]:
        """Return new layers that hold an adapter, by path; the model is unchanged.

        The layers are in eval mode and share the model's own modules as their bases.

        Raises:
            DoRAError: If there is no such adapter.
        """
        self._known(name)
        made: dict[str, DoRALayer] = {}
        for path in self._adapters[name].paths:
            parts = self._matrices(name, path)
            made[path] = copy.copy(self._place(path).layer)
            made[path].eval()
            made[path].take(*self._terms(path, [(1.0, parts)]))
        return made

    def _known(self, name: str) -> None:
        if name not in self._adapters:
            known = ", ".join(self._adapters) or "none"
            raise DoRAError(f"there is no adapter named {name!r}; there are: {known}.")

    def _problems(self, adapter: Adapter, check_base: bool) -> list[str]:
        if adapter.fine_tune_type == "full":
            return ["a full fine-tuning is a separate model, not an adapter"]
        problems = all_problems(self._model, adapter, check_base)
        if problems := problems or overflow_problems(adapter):
            return problems
        modules = dict(self._model.named_modules())
        for path in adapter.paths:
            try:
                dora_class(modules[path])
            except DoRAError as error:  # a LoRA adapter may be on any module
                problems.append(f"{path}: {str(error).rstrip('.')}")
        return problems

    def _paths(self, names: Mapping[str, float]) -> list[str]:
        paths = [path for name in names for path in self._adapters[name].paths]
        return list(dict.fromkeys(paths))

    def _matrices(self, name: str, path: str) -> list[Measured]:
        """Return the adapter's matrices of a module; computes norms on first use."""
        parts = self._parts.setdefault(name, {})
        if path not in parts:
            base = self._place(path).base
            adapted = adapted_matrices(self._adapters[name], path, base)
            pairs = zip(matrices(weight_of(base)), adapted, strict=True)
            parts[path] = [measured(weight, matrix) for weight, matrix in pairs]
        return parts[path]

    def _place(self, path: str) -> _Place:
        if path not in self._places:
            base = self._modules[path]
            layer = dora_class(base).from_base(base)
            layer.freeze()
            layer.train(self._model.training)
            self._places[path] = _Place(base, layer)
        return self._places[path]

    def _terms(
        self, path: str, here: list[tuple[float, list[Measured]]]
    ) -> tuple[mx.array, mx.array, mx.array, float, mx.array]:
        """Return A, B, m, scale and norm in the shapes of the module's layer."""
        base = self._places[path].base
        weight = weight_of(base)
        if len(here) == 1 and here[0][0] == 1:
            result = here[0][1]
        else:
            columns = [[(w, part) for part in parts] for w, parts in here]
            rows = zip(matrices(weight), *columns, strict=True)
            result = [blend(matrix, parts) for matrix, *parts in rows]
        scale, norms = result[0].update.scale, [part.terms.norm for part in result]
        parts = [
            {"lora_a": part.update.lora_a, "lora_b": part.update.lora_b, "m": part.m}
            for part in result
        ]
        tensors = adapter_tensors(path, base, weight, parts)
        lora_a, lora_b, m = (tensors[f"{path}.{n}"] for n in ("lora_a", "lora_b", "m"))
        return lora_a, lora_b, m, scale, norms[0] if m.ndim == 1 else mx.stack(norms)

    def _show(self, paths: Mapping[str, object]) -> None:
        """Put layers at these paths, and base modules everywhere else."""
        put_modules(
            self._model,
            [
                (path, place.layer if path in paths else place.base)
                for path, place in self._places.items()
            ],
        )
