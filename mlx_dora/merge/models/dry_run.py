"""Says what each tensor of a merge of models would get, without merging it."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_dora.errors import DoRAError, printable
from mlx_dora.io.derived import is_buffer
from mlx_dora.merge.methods.settings import TensorSettings
from mlx_dora.merge.models.model_tensor import Job
from mlx_dora.merge.models.opened import OpenedMerge, open_merge
from mlx_dora.merge.models.place import Place
from mlx_dora.merge.models.plan import MergePlan
from mlx_dora.merge.models.tensor import way_of
from mlx_dora.notebook import Shown

_WAYS = {
    "blocks": "by element",
    "mean": "the weighted mean",
    "whole": "as one vector",
    "rows": "row by row",
}


@dataclass(frozen=True, kw_only=True)
class PlannedTensor:
    """What a tensor of the output gets.

    Attributes:
        name: Name in the output.
        shape: Shape.
        dtype: Dtype, and how it is packed.
        treatment: How it is made.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    treatment: str


@dataclass(frozen=True, kw_only=True, repr=False)
class DryRun(Shown):
    """A merge of models that was planned and checked, but not carried out.

    Attributes:
        method: Name of the method.
        models: Folders or Hub ids of the models.
        tensors: What each tensor gets.
        notes: Notes about the settings and inputs, one sentence each.
    """

    method: str
    models: tuple[str, ...]
    tensors: tuple[PlannedTensor, ...]
    notes: tuple[str, ...] = ()

    def facts(self) -> dict[str, Any]:
        """Return the method and the numbers of models and tensors."""
        models = list(self.models)
        return {"method": self.method, "models": models, "tensors": len(self.tensors)}

    def table(self) -> list[dict[str, Any]]:
        """Return the tensors."""
        return [asdict(tensor) for tensor in self.tensors]

    def details(self) -> list[str]:
        """Return nothing: the summary has every tensor."""
        return []

    def lines(self) -> list[str]:
        """The notes, and a line for each tensor."""
        each = [
            f"{t.name} {list(t.shape)} {t.dtype}: {t.treatment}" for t in self.tensors
        ]
        total = sum(int(np.prod(t.shape, dtype=np.int64)) for t in self.tensors)
        return [
            *map(printable, self.notes),
            *map(printable, each),
            f"Would merge {len(self.tensors)} tensors ({total:,} values) of "
            f"{len(self.models)} models by {self.method}; nothing was written.",
        ]


def dry_run(plan: MergePlan) -> DryRun:
    """Plan and check a merge of models; reads headers and tokenizers only.

    Raises:
        DoRAError: If an input or a setting is invalid, as when merging.
    """
    opened = open_merge(plan)
    return DryRun(
        method=plan.method,
        models=plan.models,
        tensors=tuple(_planned(opened, job, place) for job, place in opened.places),
        notes=tuple(opened.notes),
    )


def _planned(opened: OpenedMerge, job: Job, place: Place) -> PlannedTensor:
    own = job.own_name(place)
    dtype = job.pattern.dtype(own)
    packing = job.pattern.packing(own)
    kind = "integers" if dtype is None else str(dtype).rpartition(".")[2]
    if packing is not None:
        kind = f"{packing.bits} bits in groups of {packing.group_size}"
    elif job.dtype is not None and not job.is_carried(place):
        kind = job.dtype
    is_carried = job.is_carried(place)
    shape = job.pattern.shape(own) if is_carried else job.shape(place)
    names = {id(model): name for name, model in reversed([*opened.models.items()])}
    if is_carried:
        text = f"copied from {names[id(job.pattern)]}"
        text += "" if is_buffer(own) else ", if all models have the same integers"
    else:
        try:
            text = _treatment(job, place, shape, names)
        except DoRAError as error:
            raise DoRAError(f"{place.name}: {error}") from error
    return PlannedTensor(name=place.name, shape=shape, dtype=kind, treatment=text)


def _treatment(
    job: Job, place: Place, shape: Sequence[int], names: dict[int, str]
) -> str:
    settings, entry = job.settings(place), job.plan.entry
    inputs = [
        _called(names[id(model)], name, place.name)
        for model, name in zip(job.inputs, place.sources, strict=True)
    ]
    if len(inputs) == 1 and not entry.needs_base:
        factor = settings.weights.reshape(-1)
        scale = 1.0 if entry.is_mean and settings.normalizes(True) else factor[0]
        copied = f"copied from {inputs[0]}"
        return copied if scale == 1 else f"{copied}, times {scale:g}"
    way = way_of(entry, len(shape), settings, job.plan.granularity)
    parts = [f"{entry.name} of {', '.join(inputs)}"]
    if job.start is not None:
        base = _called(names[id(job.start)], place.base, place.name)
        parts[0] += f" over {base}"
    parts.append(_WAYS["mean"] if job.fishers else _WAYS[way])
    if entry.takes_weights:
        parts.append(f"weights {_listed(settings.weights)}")
    parts += _settings(job, settings)
    if job.vocabulary is not None and job.pattern.holds_tokens(job.own_name(place)):
        parts.append("rows aligned by token")
    return "; ".join(parts)


def _settings(job: Job, settings: TensorSettings) -> list[str]:
    """The settings that the method uses, besides the weights."""
    used = set(job.plan.entry.parameters)
    values: dict[str, Any] = {
        "density": settings.density,
        "normalize": settings.normalize,
        "lambda": settings.scale,
        "rescale": settings.rescale,
        "seed": settings.seed,
    }
    own = settings.own.items()
    shown = [(k, v) for k, v in values.items() if k in used and v is not None]
    return [f"{key} {_listed(value)}" for key, value in [*shown, *own]]


def _listed(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, np.ndarray) and value.ndim > 1:
        return "by row"
    values = np.atleast_1d(np.array(value, np.float64))
    return ", ".join(f"{each:.6g}" for each in values)


def _called(model: str, name: str, output: str) -> str:
    """A model, and the name of its tensor if that is not the output's."""
    model = model if "/" not in model else Path(model).name
    return model if name == output else f"{name} of {model}"
