"""mergekit's YAML, for the methods that both have, with mergekit's definitions.

Understood: ``merge_method``, ``models`` with ``parameters``, ``base_model``,
``parameters`` (numbers, gradients, filters), ``dtype``, ``out_dtype``. Anything else is
refused by name. Tensors are merged as a whole, as mergekit does; arithmetic is float32
whatever ``dtype`` says, which here is the output's.
"""

from collections.abc import Mapping
from typing import Any

from mlx_dora.errors import DoRAError
from mlx_dora.merge.plan import MergePlan

_TOP = (
    "merge_method",
    "models",
    "base_model",
    "parameters",
    "dtype",
    "out_dtype",
)
# mergekit's name: ours, the parameters it takes, and its defaults where ours differ.
_METHODS: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "linear": ("linear", ("weight", "normalize"), {}),
    "slerp": ("slerp", ("t",), {}),
    "karcher": ("karcher", (), {}),
    "task_arithmetic": ("task_arithmetic", ("weight", "normalize", "lambda"), {}),
    "ties": ("ties", ("weight", "density", "normalize", "lambda"), {}),
}
_OF_A_MODEL = ("weight", "density")


def read_mergekit(content: Any) -> MergePlan:
    """Make a plan of a mergekit configuration.

    Args:
        content: The parsed YAML.

    Raises:
        DoRAError: For a key or a method that is not understood, or a bad value.
    """
    if not isinstance(content, Mapping):
        raise DoRAError(f"a merge config must be a mapping, got {content!r:.60}.")
    _refuse_unknown("the merge config", content, _TOP)
    name = content.get("merge_method")
    if not isinstance(name, str) or name not in _METHODS:
        raise DoRAError(
            f"merge_method {name!r} is not one that is understood here: "
            f"{', '.join(_METHODS)}."
        )
    method, known, defaults = _METHODS[name]
    shared = content.get("parameters") or {}
    _refuse_unknown("parameters", shared, known)
    entries = content.get("models")
    if not isinstance(entries, list) or not entries:
        raise DoRAError("the merge config needs models: a list.")
    models, own = [], []
    for entry in entries:
        if not isinstance(entry, Mapping) or not isinstance(entry.get("model"), str):
            raise DoRAError(f"models: {entry!r:.60} does not name a model.")
        _refuse_unknown(f"models: {entry['model']}", entry, ("model", "parameters"))
        parameters = entry.get("parameters") or {}
        allowed = [key for key in known if key in _OF_A_MODEL]
        _refuse_unknown(f"parameters of {entry['model']}", parameters, allowed)
        if "+" in entry["model"]:
            raise DoRAError(
                f"{entry['model']}: model+adapter is not understood; fuse it first."
            )
        models.append(entry["model"])
        own.append(parameters)
    base = content.get("base_model")
    if base is not None and not isinstance(base, str):
        raise DoRAError(f"base_model must be a path or a name, got {base!r:.60}.")
    models, own, base = _take_base(method, models, own, base)
    return MergePlan(
        models=tuple(models),
        base=base,
        method=method,
        granularity="tensor",
        per_model=tuple(own),
        parameters={**defaults, **shared},
        dtype=content.get("out_dtype") or content.get("dtype"),
        relative=False,
    )


def _take_base(
    method: str, models: list[str], own: list[Any], base: str | None
) -> tuple[list[str], list[Any], str | None]:
    """Keep to mergekit's rules: slerp starts at the base, task methods leave it out."""
    if method == "slerp":
        if base is None:
            raise DoRAError("slerp needs base_model: the model that t = 0 gives.")
        others = [one for one in models if one != base]
        if len(others) != 1:
            raise DoRAError(f"slerp takes the base and one other model, got {models}.")
        return [base, others[0]], [{}, {}], base
    if method in ("task_arithmetic", "ties"):
        kept = [i for i, one in enumerate(models) if one != base]
        return [models[i] for i in kept], [own[i] for i in kept], base
    if base is not None and base not in models:
        raise DoRAError(f"{method}: base_model {base} must be among the models.")
    return models, own, base


def _refuse_unknown(
    what: str, content: Any, known: tuple[str, ...] | list[str]
) -> None:
    if not isinstance(content, Mapping):
        raise DoRAError(f"{what} must be a mapping, got {content!r:.60}.")
    if unknown := [str(key) for key in content if key not in known]:
        raise DoRAError(
            f"{what}: {', '.join(unknown)} not understood; known here: "
            f"{', '.join(known) or 'none'}."
        )
