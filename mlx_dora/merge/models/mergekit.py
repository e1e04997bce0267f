"""Reads mergekit's YAML for shared methods, with mergekit's definitions.

Tensors are merged as a whole, as in mergekit. Arithmetic is float32; ``dtype`` sets
only the dtype of the output. Keys that do not change the weights are accepted with a
note. Unsupported keys that would change the result are refused by name.
"""

from dataclasses import replace
from typing import Any

from mlx_dora.errors import DoRAError
from mlx_dora.merge.methods import MERGEKIT, Mergekit, MergeMethod
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
# mergekit's parameters that never change a weight here.
_WITHOUT_EFFECT = {
    "int8_mask": "only saves memory in mergekit",
    "max_iter": "this karcher runs until it converges",
    "tol": "this karcher runs until it converges",
    "dtype": "put it at the top level, where it sets the output's dtype",
}
_OF_ANY_METHOD = {key for kit, _ in MERGEKIT.values() for key in kit.takes}


def read_mergekit(content: Any) -> MergePlan:
    """Make a plan from a mergekit configuration.

    Args:
        content: The parsed YAML.

    Raises:
        DoRAError: For an unknown key or method, or a bad value.
    """
    top = mapping("a merge config", content)
    refuse_unknown("the merge config", top, _TOP)
    name = text_of("merge_method", top)
    if name not in MERGEKIT:
        raise DoRAError(
            f"merge_method {name!r} is not supported here, expected one of "
            f"{', '.join(MERGEKIT)}."
        )
    (kit, method), notes = MERGEKIT[name], []
    layout = _take_base(kit, method, read_layout(top))
    shared = _known(kit, "parameters", layout.shared, notes)
    own = []
    for model, settings in zip(layout.models, layout.own, strict=True):
        accepted = _known(kit, f"parameters of {model}", settings, notes)
        if wrong := [key for key in accepted if key not in _OF_A_MODEL]:
            raise DoRAError(
                f"parameters of {model}: {', '.join(wrong)} not supported there; put "
                "it under the file's parameters."
            )
        own.append(accepted)
    if top.get("name") is not None:
        notes.append("name: has no effect on the merged model.")
    by_row = _is_by_row(kit, shared)
    parameters = {**kit.defaults, **_renamed(kit, shared)}
    if not any("density" in values for values in own):
        notes.append(method.note_of(parameters.get("density", 0.0)) or "")
    return MergePlan(
        models=layout.models,
        base=layout.base,
        method=method.name,
        granularity="row" if by_row else "tensor",
        weighting=kit.weights,
        per_model=tuple(_renamed(kit, values) for values in own),
        parameters=parameters,
        dtype=text_of("out_dtype", top) or text_of("dtype", top),
        relative=kit.uses_base,
        blocks=layout.blocks,
        tokenizer=_tokenizer(top),
        chat_template=text_of("chat_template", top),
        notes=tuple(dict.fromkeys(filter(None, notes))),
    )


def _is_by_row(kit: Mergekit, shared: Settings) -> bool:
    """Whether to merge rows instead of whole tensors; refuses unsupported values."""
    for key, value in kit.only.items():
        if shared.get(key, value) is not value:
            raise DoRAError(f"parameters: {key} must be {value}, got {shared[key]!r}.")
    if kit.row_when is None or kit.row_when[0] not in shared:
        return False
    key, by_row = kit.row_when
    if not isinstance(shared[key], bool):
        raise DoRAError(
            f"parameters: {key} must be true or false, got {shared[key]!r}."
        )
    return shared[key] is by_row


def _renamed(kit: Mergekit, settings: Settings) -> Settings:
    return {kit.renamed.get(key, key): value for key, value in settings.items()}


def _known(kit: Mergekit, where: str, settings: Settings, notes: list[str]) -> Settings:
    """The parameters that the method uses; adds notes on those without effect."""
    known: dict[str, Any] = {}
    for key, value in settings.items():
        if key in kit.takes:
            known[key] = value
        elif reason := _WITHOUT_EFFECT.get(key):
            notes.append(f"{where}: {key} has no effect here: {reason}.")
        elif key == "rescale" and value is not False and "density" in kit.takes:
            raise DoRAError(f"{where}: rescale is not supported with {kit.name}.")
        elif key in _OF_ANY_METHOD:
            notes.append(f"{where}: {key} has no effect on {kit.name}.")
        else:
            raise DoRAError(
                f"{where}: {key} is unknown; {kit.name} uses "
                f"{', '.join(kit.takes) or 'none'}."
            )
    return known


def _take_base(kit: Mergekit, method: MergeMethod, layout: Layout) -> Layout:
    """Apply mergekit's rules on which model comes first and which is left out."""
    models, base = layout.models, layout.base
    if kit.starts_at_base:
        if base is None:
            raise DoRAError(f"{kit.name} needs base_model: the result at t = 0.")
        others = tuple(model for model in models if model != base)
        if len(others) != 1:
            raise DoRAError(
                f"{kit.name} merges the base and one other model, got "
                f"{', '.join(models)}."
            )
        own = dict(zip(models, layout.own, strict=True))
        return replace(
            layout, models=(base, *others), own=(own.get(base, {}), own[others[0]])
        )
    if method.base == "changes" or (kit.uses_base and base is not None):
        kept = [i for i, model in enumerate(models) if model != base]
        if not kept:
            raise DoRAError(f"{kit.name} needs a model besides its base.")
        return replace(
            layout,
            models=tuple(models[i] for i in kept),
            own=tuple(layout.own[i] for i in kept),
        )
    if kit.inputs == (1, 1) and len(models) != 1:
        raise DoRAError(f"{kit.name} uses one model, got {', '.join(models)}.")
    if base is not None and base not in models:
        raise DoRAError(f"{kit.name}: base_model {base} must be among the models.")
    return layout


def _tokenizer(top: Settings) -> str | None:
    """Source of the output's tokenizer: ``base``, ``union`` or a model's name."""
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
