"""Opens the inputs of a merge of models, checks them, and finds every output tensor."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlx_dora.adapters.keys import natural_order
from mlx_dora.merge.fisher.information import Fisher, check_fishers, check_paths
from mlx_dora.merge.models.adapted_tensors import open_model
from mlx_dora.merge.models.files import (
    TokenizerChoice,
    choose_tokenizer,
    config_changes,
)
from mlx_dora.merge.models.fit import check_fit, check_slice, notes_of_copies
from mlx_dora.merge.models.model_tensor import Job
from mlx_dora.merge.models.model_tensors import ModelTensors
from mlx_dora.merge.models.place import Place, slice_places, whole_places
from mlx_dora.merge.models.plan import MergePlan
from mlx_dora.merge.models.settings import count_blocks


@dataclass(frozen=True, kw_only=True)
class OpenedMerge:
    """A merge whose inputs are open and fit together.

    Attributes:
        pattern: The model whose config and files the output has.
        models: All models by name.
        places: Every tensor of the output, in natural order, with the job it is part
            of.
        config: Changes of the pattern's config.
        tokenizer: The output's tokenizer.
        fishers: Fisher information of each input; empty if not used.
        notes: Notes about the settings and inputs, one sentence each.
    """

    pattern: ModelTensors
    models: Mapping[str, ModelTensors]
    places: Sequence[tuple[Job, Place]]
    config: Mapping[str, Any]
    tokenizer: TokenizerChoice
    fishers: Sequence[Fisher]
    notes: Sequence[str]

    @property
    def folders(self) -> list[Path]:
        """All folders that are read."""
        return [path.parent for path in self.files]

    @property
    def files(self) -> list[Path]:
        """All files that determine the tensors."""
        files = dict.fromkeys(f for model in self.models.values() for f in model.files)
        if self.tokenizer.vocabulary is not None:
            folders = {model.folder for model in self.models.values()}
            folders.add(self.tokenizer.vocabulary.tokenizer.folder)
            files |= dict.fromkeys(sorted(f / "tokenizer.json" for f in folders))
        return list(files)


def open_merge(plan: MergePlan) -> OpenedMerge:
    """Open and check the inputs of a plan; reads headers and tokenizers only.

    Raises:
        DoRAError: If an input is invalid, or the models do not fit together.
    """
    fishers = check_fishers(plan.method, plan.fisher, len(plan.models))
    models: dict[str, ModelTensors] = {}
    by_label: dict[str, ModelTensors] = {}
    for name in plan.names:
        model = open_model(name)
        models[name] = by_label.setdefault(model.label, model)
    pattern = models[plan.base or plan.models[0]]
    notes = [*plan.notes, *(note for m in by_label.values() for note in m.notes)]
    choice = choose_tokenizer(plan, pattern, models, notes)
    if plan.parts:
        places = _slices(plan, pattern, models, choice)
        every = list(models.values())
    else:
        every = [models[name] for name in plan.models]
        check_fit(pattern, every, plan.pad, choice.vocabulary)
        places = _whole(plan, pattern, models, choice, fishers)
    notes += notes_of_copies(pattern, every)
    check_paths(fishers, [name.removesuffix(".weight") for name in pattern.names])
    changes = config_changes(plan, pattern, models, choice, notes)
    return OpenedMerge(
        pattern=pattern,
        models=models,
        places=sorted(places, key=lambda pair: natural_order(pair[1].name)),
        config=changes,
        tokenizer=choice,
        fishers=fishers,
        notes=tuple(dict.fromkeys(notes)),
    )


def _whole(
    plan: MergePlan,
    pattern: ModelTensors,
    models: Mapping[str, ModelTensors],
    choice: TokenizerChoice,
    fishers: Sequence[Fisher],
) -> list[tuple[Job, Place]]:
    """Places in a merge of whole models."""
    job = Job(
        plan=plan,
        pattern=pattern,
        base=None if plan.base is None else models[plan.base],
        inputs=[models[name] for name in plan.models],
        fishers=fishers,
        dtype=plan.dtype,
        vocabulary=choice.vocabulary,
    )
    blocks = count_blocks(pattern.names)
    places = whole_places(pattern.names, len(plan.models), blocks)
    return [(job, place) for place in places]


def _slices(
    plan: MergePlan,
    donor: ModelTensors,
    models: Mapping[str, ModelTensors],
    choice: TokenizerChoice,
) -> list[tuple[Job, Place]]:
    """Places in a stack of slices."""
    steps, first = [], 0
    for i, part in enumerate(plan.parts):
        base = None if part.base is None else models[part.base]
        uses_base = base is not None and (part.relative or part.entry.needs_base)
        start = part.base_start if uses_base else part.starts[0]
        pattern = base if uses_base and base is not None else models[part.models[0]]
        check_slice(part, pattern, start, models, donor)
        job = Job(
            plan=replace(part, seed=plan.seed),
            pattern=pattern,
            base=base if uses_base else None,
            inputs=[models[name] for name in part.models],
            dtype=plan.dtype,
            vocabulary=choice.vocabulary,
        )
        places = slice_places(
            pattern.names,
            part.starts,
            part.base_start,
            start,
            part.count or 0,
            first,
            is_first=i == 0,
            is_last=i == len(plan.parts) - 1,
        )
        steps += [(job, place) for place in places]
        first += part.count or 0
    return steps
