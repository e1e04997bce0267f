"""mergekit's YAML, for the methods that both have, with mergekit's definitions.

Tensors are merged as a whole, as mergekit does; arithmetic is float32 whatever
``dtype`` says, which here is the output's. Keys that change no weight are accepted with
a note; what would change the result and is not supported is refused by name.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlx_dora.errors import DoRAError
from mlx_dora.merge.models.mergekit_layout import (
    Layout,
    Settings,
    mapping,
    read_layout,
    refuse_unknown,
    text_of,
)
from mlx_dora.merge.models.plan import MergePlan

_TOP = (
    "merge_method",
    "models",
    "slices",
    "modules",
    "base_model",
    "parameters",
    "dtype",
    "out_dtype",
    "tokenizer_source",
    "tokenizer",
    "chat_template",
    "name",
)
_OF_A_MODEL = ("weight", "density", "scale")
# Parameters that mergekit has and that change no weight of a method that lacks them.
_WITHOUT_EFFECT = {
    "int8_mask": "only saves memory in mergekit",
    "max_iter": "this karcher runs until it converges",
    "tol": "this karcher runs until it converges",
    "dtype": "it belongs to the top level, where it sets the output's dtype",
}
_OF_OTHER_METHODS = (
    "weight",
    "density",
    "normalize",
    "rescale",
    "lambda",
    "t",
    "scale",
)


@dataclass(frozen=True, kw_only=True)
class _Method:
    """How a method of mergekit is done here.

    Attributes:
        method: Our name.
        parameters: Those that it takes.
        defaults: mergekit's, where ours differ.
        renamed: mergekit's parameter to ours.
    """

    method: str
    parameters: tuple[str, ...]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)


_SUM = ("weight", "normalize", "lambda")
_METHODS = {
    "linear": _Method(method="linear", parameters=("weight", "normalize")),
    "slerp": _Method(method="slerp", parameters=("t",)),
    "karcher": _Method(method="karcher", parameters=()),
    "task_arithmetic": _Method(method="task_arithmetic", parameters=_SUM),
    "ties": _Method(
        method="ties", parameters=(*_SUM, "density"), defaults={"density": 1.0}
    ),
    "dare_linear": _Method(
        method="dare",
        parameters=(*_SUM, "density", "rescale"),
        defaults={"density": 1.0},
    ),
    "dare_ties": _Method(
        method="dare_ties",
        parameters=(*_SUM, "density", "rescale"),
        defaults={"density": 1.0, "normalize": False},
    ),
    "passthrough": _Method(
        method="linear",
        parameters=("scale",),
        defaults={"weight": 1.0, "normalize": False},
        renamed={"scale": "weight"},
    ),
}


def read_mergekit(content: Any) -> MergePlan:
    """Make a plan of a mergekit configuration.

    Args:
        content: The parsed YAML.

    Raises:
        DoRAError: For a key or a method that is not understood, or a bad value.
    """
    top = mapping("a merge config", content)
    refuse_unknown("the merge config", top, _TOP)
    name = text_of("merge_method", top)
    if name not in _METHODS:
        raise DoRAError(
            f"merge_method {name!r} is not one that is understood here: "
            f"{', '.join(_METHODS)}."
        )
    method, notes = _METHODS[name], []
    layout = _take_base(name, read_layout(top))
    shared = _known(name, method, "parameters", layout.shared, notes)
    own = []
    for model, settings in zip(layout.models, layout.own, strict=True):
        found = _known(name, method, f"parameters of {model}", settings, notes)
        if wrong := [key for key in settings if key in found and _is_shared(key)]:
            raise DoRAError(
                f"parameters of {model}: {', '.join(wrong)} not understood there; put "
                "it under the file's parameters."
            )
        own.append(found)
    if top.get("name") is not None:
        notes.append("name: has no effect on the merged model.")
    return MergePlan(
        models=layout.models,
        base=layout.base,
        method=method.method,
        granularity="tensor",
        per_model=tuple(_renamed(method, one) for one in own),
        parameters={**method.defaults, **_renamed(method, shared)},
        dtype=text_of("out_dtype", top) or text_of("dtype", top),
        relative=False,
        blocks=layout.blocks,
        tokenizer=_tokenizer(top),
        chat_template=text_of("chat_template", top),
        notes=tuple(dict.fromkeys(notes)),
    )


def _is_shared(key: str) -> bool:
    return key not in _OF_A_MODEL


def _renamed(method: _Method, settings: Settings) -> Settings:
    return {method.renamed.get(key, key): value for key, value in settings.items()}


def _known(
    name: str, method: _Method, where: str, settings: Settings, notes: list[str]
) -> Settings:
    """The parameters that the method takes; notes of those without effect."""
    known: dict[str, Any] = {}
    for key, value in settings.items():
        if key in method.parameters:
            known[key] = value
        elif reason := _WITHOUT_EFFECT.get(key):
            notes.append(f"{where}: {key} has no effect here: {reason}.")
        elif key == "rescale" and value is not False and "density" in method.parameters:
            raise DoRAError(f"{where}: rescale is not supported with {name}.")
        elif key in _OF_OTHER_METHODS:
            notes.append(f"{where}: {key} has no effect on {name}.")
        else:
            raise DoRAError(
                f"{where}: {key} not understood; {name} takes "
                f"{', '.join(method.parameters) or 'none'}."
            )
    return known


def _take_base(name: str, layout: Layout) -> Layout:
    """Keep to mergekit's rules: slerp starts at the base, task methods leave it out."""
    models, base = layout.models, layout.base
    if name == "slerp":
        if base is None:
            raise DoRAError("slerp needs base_model: the model that t = 0 gives.")
        others = tuple(one for one in models if one != base)
        if len(others) != 1:
            raise DoRAError(
                f"slerp takes the base and one other model, got {', '.join(models)}."
            )
        own = dict(zip(models, layout.own, strict=True))
        return _with(layout, (base, *others), (own.get(base, {}), own[others[0]]))
    if name in ("task_arithmetic", "ties", "dare_linear", "dare_ties"):
        kept = [i for i, one in enumerate(models) if one != base]
        if not kept:
            raise DoRAError(f"{name} needs a model beside its base.")
        return _with(layout, [models[i] for i in kept], [layout.own[i] for i in kept])
    if name == "passthrough" and len(models) != 1:
        raise DoRAError(f"passthrough takes one model, got {', '.join(models)}.")
    if base is not None and base not in models:
        raise DoRAError(f"{name}: base_model {base} must be among the models.")
    return layout


def _with(layout: Layout, models: Sequence[str], own: Sequence[Settings]) -> Layout:
    return Layout(
        models=tuple(models),
        own=tuple(own),
        shared=layout.shared,
        base=layout.base,
        blocks=layout.blocks,
    )


def _tokenizer(top: Settings) -> str | None:
    """Whose tokenizer the output gets: ``base``, ``union`` or a model's name."""
    if top.get("tokenizer") is None:
        return text_of("tokenizer_source", top)
    if top.get("tokenizer_source") is not None:
        raise DoRAError("give either tokenizer_source or tokenizer, not both.")
    settings = mapping("tokenizer", top["tokenizer"])
    known = ("source", "tokens", "pad_to_multiple_of")
    refuse_unknown("tokenizer", settings, known)
    if given := [key for key in known[1:] if settings.get(key)]:
        raise DoRAError(
            f"tokenizer: {', '.join(given)} would change the rows of the embeddings, "
            "which is not supported."
        )
    return text_of("source", settings) or "union"
