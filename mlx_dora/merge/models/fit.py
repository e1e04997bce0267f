"""Checks that models match; describes tensors that only some of them store."""

from collections.abc import Iterable, Mapping, Sequence

from mlx_dora.adapters.adapter import listed
from mlx_dora.adapters.keys import natural_order
from mlx_dora.errors import DoRAError
from mlx_dora.io.derived import is_buffer
from mlx_dora.merge.models.model_tensors import ModelTensors
from mlx_dora.merge.models.plan import MergePlan
from mlx_dora.merge.models.settings import (
    block_of,
    block_prefix,
    count_blocks,
    with_block,
)
from mlx_dora.merge.models.vocabulary import Vocabulary

# Keys of the config that models need to have in common to share blocks.
_SAME = (
    "hidden_size",
    "n_embd",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rope_theta",
    "rms_norm_eps",
)


def check_fit(
    pattern: ModelTensors,
    inputs: Sequence[ModelTensors],
    pad: bool,
    vocabulary: Vocabulary | None = None,
) -> None:
    """Refuse models that differ in names or shapes, naming all problems at once."""
    own = set(pattern.names)
    for model in inputs:
        if model is pattern:
            continue
        _check_kind(pattern, model)
        missing = {n for n in own if not model.has(n) and not is_buffer(n)}
        extra = set(model.names) - model.copies - own
        problems = listed("missing:", sorted(missing, key=natural_order))
        problems += listed("extra:", sorted(extra, key=natural_order))
        if extra and all(model.holds_tokens(name) for name in extra):
            problems.append(
                f"{pattern.label} ties its head to the embedding: give the model with "
                "its own head as the base, or first"
            )
        unlike = {
            name: _is_vocabulary(name, model, pattern)
            for name in sorted(own - missing, key=natural_order)
            if not is_buffer(name)
            and model.shape(name) != pattern.shape(name)
            and not (vocabulary is not None and _is_aligned(name, model, pattern))
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
            problems.append(
                "the vocabularies differ: set tokenizer_source in a merge config to "
                "unite them by token, or pad (--pad) to merge them row by row"
            )
        if problems:
            raise DoRAError(
                f"{model.label} does not fit {pattern.label}: {'; '.join(problems)}."
            )


def check_slice(
    part: MergePlan,
    pattern: ModelTensors,
    start: int,
    models: Mapping[str, ModelTensors],
    donor: ModelTensors,
) -> None:
    """Refuse a slice whose blocks do not exist or do not fit, naming all problems.

    Args:
        part: The plan of the slice.
        pattern: The model whose tensors the slice has.
        start: First block of the slice in the pattern.
        models: All models by name.
        donor: The model whose config the output has.
    """
    starts = dict(zip(part.models, part.starts, strict=True))
    if part.base is not None:
        starts.setdefault(part.base, part.base_start)
    count, problems = part.count or 0, []
    for name, first in starts.items():
        model = models[name]
        _check_kind(donor, model)
        blocks = count_blocks(model.names)
        prefixes = {p for n in model.names if (p := block_prefix(n))}
        if len(prefixes) > 1:
            problems.append(f"{name} has several stacks of blocks: {sorted(prefixes)}")
        if first + count > blocks:
            problems.append(
                f"layer_range [{first}, {first + count}] of {name}, which has {blocks} "
                "blocks"
            )
        for key in _SAME:
            if (own := model.config.get(key)) != (other := donor.config.get(key)):
                problems.append(f"{key} of {name} is {own}, of {donor.label} {other}")
        if model.config.get("quantization") != donor.config.get("quantization"):
            problems.append(f"{name} is packed differently from {donor.label}")
    if not problems:
        tensors = [n for n in pattern.names if 0 <= (block_of(n) or 0) - start < count]
        for name, first in starts.items():
            model = models[name]
            problems += [
                f"{name} has no {other} of shape {pattern.shape(own)}"
                for own in tensors
                if block_of(own) is not None
                for other in [with_block(own, (block_of(own) or 0) - start + first)]
                if not model.has(other) or model.shape(other) != pattern.shape(own)
            ]
    if problems:
        raise DoRAError(f"slices: {'; '.join(problems[:5])}.")


def _check_kind(pattern: ModelTensors, model: ModelTensors) -> None:
    kind, other = (m.config.get("model_type") for m in (pattern, model))
    if other != kind:
        raise DoRAError(
            f"{model.label} is a {other} model and {pattern.label} a {kind} model: "
            "merge only models of the same type."
        )


def _is_aligned(name: str, model: ModelTensors, pattern: ModelTensors) -> bool:
    """Whether a tensor has rows by token, of the same size."""
    return (
        pattern.holds_tokens(name)
        and model.shape(name)[1:] == (pattern.shape(name)[1:])
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
            f"Left out, since {pattern.label} does not store them and they can be "
            f"derived from other tensors or the config: {_listed(left_out)}."
        )
    heads = {n for n in own if pattern.original(n) != n}
    if heads:
        notes.append(f"{_listed(heads)}: a copy of the merged embedding (tied).")
    shared = [
        f"{name} of {model.label}"
        for name in own - pattern.copies
        for model in inputs
        if model.original(name) != name
    ]
    if shared:
        notes.append(f"The embedding, which is tied, is merged as {_listed(shared)}.")
    kinds = {
        model.label: sorted(
            {str(model.dtype(n)) for n in model.names if model.dtype(n)}
        )
        for model in (pattern, *inputs)
    }
    if len(set(map(tuple, kinds.values()))) > 1:
        listing = "; ".join(
            f"{name} {', '.join(each).replace('mlx.core.', '')}"
            for name, each in kinds.items()
        )
        notes.append(
            f"The models' dtypes differ ({listing}): the output has those of "
            f"{pattern.label} unless a dtype is set."
        )
    if carried := {n for n in pattern.copies if is_buffer(n)}:
        notes.append(
            f"Rotary buffers are copied from {pattern.folder}: {_listed(carried)}."
        )
    return notes


def _listed(names: Iterable[str]) -> str:
    ordered = sorted(names, key=natural_order)
    more = f" and {len(ordered) - 3} more" if len(ordered) > 3 else ""
    return f"{', '.join(ordered[:3])}{more}"
