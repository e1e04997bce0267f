"""Reads which models a mergekit file merges: ``models``, ``slices`` or ``modules``."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_dora.errors import DoRAError
from mlx_dora.merge.models.settings import check_setting, layered

Settings = Mapping[str, Any]
"""Parameters by name: numbers, gradients or filters."""

_FORMS = ("models", "slices", "modules")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The models, or slices of their blocks, that make one slice of the output.

    Attributes:
        models: Paths or names, in the file's order.
        own: Parameters of each model.
        shared: Parameters of all models, including the file's top level.
        base: The base model.
        starts: First block of each model; empty for whole models.
        base_start: First block of the base: where it is listed, else the first
            model's.
        count: Number of blocks; None for whole models.
    """

    models: tuple[str, ...]
    own: tuple[Settings, ...]
    shared: Settings
    base: str | None
    starts: tuple[int, ...] = ()
    base_start: int = 0
    count: int | None = None


def read_layouts(content: Settings, notes: list[str]) -> list[Layout]:
    """Read the models of a mergekit file: one layout for each slice of the output.

    A single module with all models counts as whole models. Adds notes on keys without
    effect.

    Raises:
        DoRAError: If a part has the wrong type, or blocks do not fit together.
    """
    forms = [form for form in _FORMS if content.get(form) is not None]
    if len(forms) != 1:
        raise DoRAError(
            f"the merge config needs one of models:, slices: and modules:, got "
            f"{', '.join(forms) or 'none of them'}."
        )
    shared, body, where = settings_of("parameters", content), content, ""
    if forms == ["modules"]:
        modules = mapping("modules", content["modules"])
        if len(modules) != 1:
            raise DoRAError(
                f"modules: expected one module, got {', '.join(map(str, modules))}."
            )
        name, body = next(iter(modules.items()))
        where = f"modules: {name}: "
        body = mapping(f"modules: {name}", body)
        refuse_unknown(f"modules: {name}", body, ("models", "slices", "parameters"))
        shared = _over(settings_of(f"{where}parameters", body), shared)
    base = text_of("base_model", content)
    slices: Any = body.get("slices")
    if slices is None:
        models, own = _entries(f"{where}models", body.get("models"), ())
        return [Layout(models=models, own=own, shared=shared, base=base)]
    name = f"{where}slices"
    if not isinstance(slices, list) or not slices:
        raise DoRAError(f"{name} must be a list, got {slices!r:.60}.")
    return [
        _read_slice(f"{name}[{i}]", entry, shared, base, notes)
        for i, entry in enumerate(slices)
    ]


def _read_slice(
    name: str, entry: Any, shared: Settings, base: str | None, notes: list[str]
) -> Layout:
    only = mapping(name, entry)
    known = ("sources", "base_model", "parameters", "residual_weight")
    refuse_unknown(name, only, known)
    if only.get("residual_weight") is not None:
        notes.append(f"{name}: residual_weight has no effect, as in mergekit.")
    shared = _over(settings_of(f"{name}: parameters", only), shared)
    sources: Any = only.get("sources")
    models, own = _entries(f"{name}: sources", sources, ("layer_range",))
    if len(set(models)) < len(models):
        raise DoRAError(f"{name}: a model is given twice: {', '.join(models)}.")
    ranges = [_layer_range(name, source) for source in sources]
    counts = {end - first for first, end in ranges}
    if len(counts) > 1 or min(counts) < 1 or min(first for first, _ in ranges) < 0:
        raise DoRAError(
            f"{name}: layer_range must have the same number of blocks, at least 1, in "
            f"every source, got {', '.join(f'{list(span)}' for span in ranges)}."
        )
    starts = tuple(first for first, _ in ranges)
    base = text_of("base_model", only) or base
    return Layout(
        models=models,
        own=own,
        shared=shared,
        base=base,
        starts=starts,
        base_start=starts[models.index(base) if base in models else 0],
        count=counts.pop(),
    )


def _layer_range(where: str, source: Settings) -> tuple[int, int]:
    value: Any = source.get("layer_range")
    is_pair = isinstance(value, list) and len(value) == 2
    if not is_pair or any(type(bound) is not int for bound in value):
        raise DoRAError(
            f"{where}: {source['model']} needs layer_range: [first, end], got "
            f"{value!r:.60}."
        )
    return value[0], value[1]


def _entries(
    where: str, entries: Any, extra: Sequence[str]
) -> tuple[tuple[str, ...], tuple[Settings, ...]]:
    if not isinstance(entries, list) or not entries:
        raise DoRAError(f"the merge config needs {where}: a list of models.")
    models, own = [], []
    for entry in entries:
        if not isinstance(entry, Mapping) or not isinstance(entry.get("model"), str):
            raise DoRAError(f"{where}: {entry!r:.60} does not name a model.")
        name = entry["model"]
        refuse_unknown(f"{where}: {name}", entry, ("model", "parameters", *extra))
        if name.count("+") > 1 or name.strip() != name or not name.strip("+"):
            raise DoRAError(
                f"{where}: expected a model or model+adapter, got {name!r:.60}."
            )
        models.append(name)
        own.append(settings_of(f"parameters of {name}", entry))
    return tuple(models), tuple(own)


def _over(first: Settings, second: Settings) -> Settings:
    """Combine settings; `first` takes precedence over `second`."""
    both = {
        key: layered(value, second[key])
        for key, value in first.items()
        if key in second
    }
    return {**second, **first, **both}


def settings_of(where: str, content: Settings) -> Settings:
    """Read and check the ``parameters`` of a part of the file.

    Raises:
        DoRAError: If they are not a mapping of numbers, gradients and filters.
    """
    parameters = content.get("parameters")
    if parameters is None:
        return {}
    for name, value in mapping(where, parameters).items():
        if name != "dtype":
            check_setting(f"{where}: {name}", value)
    return parameters


def mapping(where: str, content: Any) -> Mapping[str, Any]:
    """Check that content is a mapping."""
    if not isinstance(content, Mapping):
        raise DoRAError(f"{where} must be a mapping, got {content!r:.60}.")
    return content


def text_of(key: str, content: Settings) -> str | None:
    """The text of a key; None if it is missing or empty."""
    value = content.get(key)
    if value is not None and not isinstance(value, str):
        raise DoRAError(f"{key} must be text, got {value!r:.60}.")
    return value or None


def refuse_unknown(where: str, content: Settings, known: Sequence[str]) -> None:
    """Refuse keys that mergekit does not have in this place.

    Raises:
        DoRAError: Naming all unknown keys.
    """
    if unknown := [str(key) for key in content if key not in known]:
        raise DoRAError(
            f"{where}: unknown {', '.join(unknown)}; known here: "
            f"{', '.join(known) or 'none'}."
        )
