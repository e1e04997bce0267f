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
    read_layouts,
    refuse_unknown,
    text_of,
)
from mlx_dora.merge.models.mergekit_tokenizer import read_tokenizer
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
    "random_seed",
)
_OF_A_MODEL = ("weight", "density", "scale")
_IDLE = {
    "name": "has no effect on the merged model",
    "random_seed": "has no effect in mergekit either; use --seed",
}
# mergekit's parameters that never change a weight here.
_WITHOUT_EFFECT = {
    "int8_mask": "only saves memory in mergekit",
    "max_iter": "this karcher runs until it converges",
    "tol": "this karcher runs until it converges",
    "eps": "small lengths need no constant here",
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
    layouts = [
        _take_base(kit, method, layout, notes) for layout in read_layouts(top, notes)
    ]
    plans = [_plan(kit, method, layout, notes) for layout in layouts]
    for key, reason in _IDLE.items():
        if top.get(key) is not None:
            notes.append(f"{key}: {reason}.")
    whole = plans[0]
    if layouts[0].count is not None:
        models = dict.fromkeys(model for plan in plans for model in plan.models)
        whole = MergePlan(
            models=tuple(models),
            base=text_of("base_model", top),
            method=method.name,
            parts=tuple(plans),
        )
    return replace(
        whole,
        dtype=_dtype(top),
        tokenizer=read_tokenizer(top),
        chat_template=text_of("chat_template", top),
        notes=tuple(dict.fromkeys(filter(None, notes))),
    )


def _plan(
    kit: Mergekit, method: MergeMethod, layout: Layout, notes: list[str]
) -> MergePlan:
    """The plan of one slice of the output, or of whole models."""
    shared = _known(kit, "parameters", layout.shared, notes)
    per_input = {parameter.name for parameter in method.own if parameter.per_input}
    own: list[dict[str, Any]] = []
    for model, settings in zip(layout.models, layout.own, strict=True):
        where = f"parameters of {model}"
        accepted = _known(kit, where, settings, notes)
        for key in [k for k in accepted if k not in (*_OF_A_MODEL, *per_input)]:
            del accepted[key]
            notes.append(
                f"{where}: {key} has no effect there, as in mergekit; put it under the "
                "parameters of the file or the slice."
            )
        own.append(accepted)
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
        relative=kit.uses_base,
        starts=layout.starts,
        base_start=layout.base_start,
        count=layout.count,
    )


def _dtype(top: Settings) -> str | None:
    """Dtype of the output; mergekit's ``dtype`` also sets that of the arithmetic."""
    name = text_of("out_dtype", top) or text_of("dtype", top)
    return None if name is None else name.removeprefix("torch.")


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


def _known(
    kit: Mergekit, where: str, settings: Settings, notes: list[str]
) -> dict[str, Any]:
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


def _take_base(
    kit: Mergekit, method: MergeMethod, layout: Layout, notes: list[str]
) -> Layout:
    """Apply mergekit's rules on which model comes first and which is left out."""
    models, base = layout.models, layout.base
    if kit.starts_at_base:
        if base is None:
            raise DoRAError(f"{kit.name} needs base_model: the result at t = 0.")
        others = [i for i, model in enumerate(models) if model != base]
        if len(others) != 1:
            raise DoRAError(
                f"{kit.name} merges the base and one other model, got "
                f"{', '.join(models)}."
            )
        chosen, own = (
            _chosen(layout, others),
            dict(zip(models, layout.own, strict=True)),
        )
        is_stacked = layout.count is not None
        return replace(
            chosen,
            models=(base, *chosen.models),
            own=(own.get(base, {}), *chosen.own),
            starts=(layout.base_start, *chosen.starts) if is_stacked else (),
        )
    if method.base == "changes" or (kit.uses_base and base is not None):
        kept = [i for i, model in enumerate(models) if model != base]
        if not kept:
            raise DoRAError(f"{kit.name} needs a model besides its base.")
        return _chosen(layout, kept)
    if base is not None and base not in models and layout.count is None:
        return _with_base(kit, layout, base, notes)
    if kit.inputs == (1, 1) and len(models) != 1:
        raise DoRAError(f"{kit.name} uses one model, got {', '.join(models)}.")
    return layout


def _chosen(layout: Layout, order: list[int]) -> Layout:
    """A layout with the models at these places."""
    return replace(
        layout,
        models=tuple(layout.models[i] for i in order),
        own=tuple(layout.own[i] for i in order),
        starts=tuple(layout.starts[i] for i in order) if layout.starts else (),
    )


def _with_base(kit: Mergekit, layout: Layout, base: str, notes: list[str]) -> Layout:
    """Add a base that is not listed as the last model, as mergekit does."""
    if kit.inputs == (1, 1):
        raise DoRAError(
            f"{kit.name} uses one model, got {', '.join(layout.models)} and base_model "
            f"{base}."
        )
    if kit.weights == "weight" and "weight" not in layout.shared:
        raise DoRAError(
            f"{kit.name}: base_model {base} counts as a model, as in mergekit, but has "
            "no weight: list it under models: with its weight."
        )
    notes.append(f"{kit.name}: base_model {base} counts as one of the models.")
    return replace(layout, models=(*layout.models, base), own=(*layout.own, {}))
