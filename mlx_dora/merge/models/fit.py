"""Checks that models match; describes tensors that only some of them store."""

from collections.abc import Iterable, Sequence

from mlx_dora.adapters.adapter import listed
from mlx_dora.adapters.keys import natural_order
from mlx_dora.errors import DoRAError
from mlx_dora.io.derived import is_buffer
from mlx_dora.merge.models.model_tensors import ModelTensors


def check_fit(pattern: ModelTensors, inputs: Sequence[ModelTensors], pad: bool) -> None:
    """Refuse models that differ in names or shapes, naming all problems at once."""
    own = set(pattern.names)
    kind = pattern.config.get("model_type")
    for model in inputs:
        if model is pattern:
            continue
        other = model.config.get("model_type")
        if other != kind:
            raise DoRAError(
                f"{model.folder} is a {other} model and {pattern.folder} a {kind} "
                "model: merge only models of the same type."
            )
        missing = {n for n in own if not model.has(n) and not is_buffer(n)}
        extra = set(model.names) - model.copies - own
        problems = listed("missing:", sorted(missing, key=natural_order))
        problems += listed("extra:", sorted(extra, key=natural_order))
        unlike = {
            name: _is_vocabulary(name, model, pattern)
            for name in sorted(own - missing, key=natural_order)
            if not is_buffer(name) and model.shape(name) != pattern.shape(name)
        }
        problems += listed(
            "other shapes:",
            [
                f"{name} {model.shape(name)} for {pattern.shape(name)}"
                for name, is_vocabulary in unlike.items()
                if not (pad and is_vocabulary)
            ],
        )
        if unlike and not pad and all(unlike.values()):
            problems.append("the vocabularies differ: set pad (--pad) to merge them")
        if problems:
            raise DoRAError(
                f"{model.folder} does not fit {pattern.folder}: {'; '.join(problems)}."
            )


def _is_vocabulary(name: str, model: ModelTensors, pattern: ModelTensors) -> bool:
    first, second = model.shape(name), pattern.shape(name)
    sizes = model.config.get("vocab_size"), pattern.config.get("vocab_size")
    has_sizes = bool(first) and bool(second) and (first[0], second[0]) == sizes
    return has_sizes and first[1:] == second[1:]


def notes_of_copies(pattern: ModelTensors, inputs: Sequence[ModelTensors]) -> list[str]:
    """Notes on stored tensors that can be derived from others."""
    notes = []
    own = set(pattern.names)
    left_out = {n for model in inputs for n in model.copies - own}
    if left_out:
        notes.append(
            f"Left out, since {pattern.folder} does not store them and they can be "
            f"derived from other tensors or the config: {_listed(left_out)}."
        )
    heads = {n for n in own if pattern.original(n) != n}
    if heads:
        notes.append(f"{_listed(heads)}: a copy of the merged embedding (tied).")
    shared = [
        f"{name} of {model.folder}"
        for name in own - pattern.copies
        for model in inputs
        if model.original(name) != name
    ]
    if shared:
        notes.append(f"The embedding, which is tied, is merged as {_listed(shared)}.")
    if carried := {n for n in pattern.copies if is_buffer(n)}:
        notes.append(
            f"Rotary buffers are copied from {pattern.folder}: {_listed(carried)}."
        )
    return notes


def _listed(names: Iterable[str]) -> str:
    ordered = sorted(names, key=natural_order)
    more = f" and {len(ordered) - 3} more" if len(ordered) > 3 else ""
    return f"{', '.join(ordered[:3])}{more}"
