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
    """The whole models that a file merges.

    Attributes:
        models: Paths or names, in the file's order.
        own: Parameters of each model.
        shared: Parameters of all models, including the file's top level.
        base: The base model.
        blocks: Number of blocks that ``slices`` cover; None for ``models``.
    """

    models: tuple[str, ...]
    own: tuple[Settings, ...]
    shared: Settings
    base: str | None
    blocks: int | None = None


def read_layout(content: Settings) -> Layout:
    """Read the models of a mergekit file.

    ``slices`` over all blocks of every model, and a single module with all of them,
    count as whole models.

    Raises:
        DoRAError: If a part has the wrong type, or slices would stack blocks.
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
    if body.get("slices") is not None:
        return _read_slices(where, body["slices"], shared, base)
    models, own = _entries(f"{where}models", body.get("models"), ())
    return Layout(models=models, own=own, shared=shared, base=base)


def _read_slices(where: str, slices: Any, shared: Settings, base: str | None) -> Layout:
    name = f"{where}slices"
    if not isinstance(slices, list) or not slices:
        raise DoRAError(f"{name} must be a list, got {slices!r:.60}.")
    if len(slices) > 1:
        raise DoRAError(
            f"{name}: {len(slices)} slices stack blocks into a new model, which is not "
            "supported; a single slice over all blocks of every model is."
        )
    only = mapping(name, slices[0])
    refuse_unknown(name, only, ("sources", "base_model", "parameters"))
    shared = _over(settings_of(f"{name}: parameters", only), shared)
    base = text_of("base_model", only) or base
    sources: Any = only.get("sources")
    models, own = _entries(f"{name}: sources", sources, ("layer_range",))
    ranges = [_layer_range(name, source) for source in sources]
    if len(set(ranges)) > 1 or ranges[0][0] != 0:
        raise DoRAError(
            f"{name}: layer_range must be the same in every source and start at 0, got "
            f"{', '.join(f'{list(span)}' for span in ranges)}."
        )
    return Layout(models=models, own=own, shared=shared, base=base, blocks=ranges[0][1])


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
        if "+" in name:
            raise DoRAError(
                f"{name}: model+adapter is not supported; fuse the adapter first."
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
