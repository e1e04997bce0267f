"""Tries merges of adapters on rows of each task, and chooses the best."""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_dora.adapters.adapter import Adapter
from mlx_dora.adapters.attach import attach_adapter
from mlx_dora.adapters.files import load_adapter
from mlx_dora.adapters.hosting import load
from mlx_dora.adapters.labels import short_names
from mlx_dora.adapters.surgery import remove_dora
from mlx_dora.data.config import DataConfig
from mlx_dora.data.dataset import Dataset
from mlx_dora.data.splits import read_splits
from mlx_dora.errors import DoRAError
from mlx_dora.evaluate.loss import LossResult, evaluate_loss
from mlx_dora.merge.adapters.merge import check_fit, merge_adapters_report
from mlx_dora.merge.choice.candidates import Candidate, default_candidates
from mlx_dora.merge.choice.config import ROWS
from mlx_dora.merge.choice.result import MergeChoice, TaskRows, Trial
from mlx_dora.merge.fisher.config import FisherConfig
from mlx_dora.merge.fisher.estimate import read_targets
from mlx_dora.progress import Progress

logger = logging.getLogger(__name__)

_TILTS = 4
_BATCH = 4
_SPLITS = ("valid", "test", "train")
"""Where rows are taken from: the first of these that exists."""

Measure = Callable[[Adapter | None, str], list[LossResult]]
"""``(adapter or None for the base, its name) -> loss on each task``."""


def choose_merge(
    adapters: Sequence[Adapter | str | Path],
    *,
    model: str | Path,
    data: Sequence[str],
    candidates: Sequence[Candidate] | None = None,
    rows: int = ROWS,
    rank: int | None = None,
    seed: int = 0,
    max_seq_length: int = 512,
    check_base: bool = True,
    progress: Progress | None = None,
) -> MergeChoice:
    """Merge adapters by several methods, and choose by the worst task's gain.

    Every candidate is merged and its loss measured on rows of each task. The gain of a
    task is the base's loss minus the merge's, as a share of what the best single
    adapter gains there. The candidate whose worst task has the largest share is chosen.
    Then the weight of the adapter that is best on that task is raised, as long as this
    helps. The same input gives the same choice.

    In completions and chats only the answers count; the rows are spread over the
    validation data (or else the test or training data).

    Args:
        adapters: At least two adapters of one base, or their folders.
        model: Folder or Hub id of the base.
        data: A data set for each task; their number may differ from the adapters'.
        candidates: The merges to try; None for `default_candidates`.
        rows: Number of rows of each task.
        rank: Maximum rank of the merged updates, as for the merge itself.
        seed: Random seed of methods that drop changes at random.
        max_seq_length: Longer rows are cut to this many tokens.
        check_base: Refuse adapters that were trained on another base.
        progress: Called after each batch of rows.

    Raises:
        DoRAError: If an adapter or a data set cannot be used, an argument is invalid,
            or every candidate fails.
    """
    if len(adapters) < 2 or not data:
        raise DoRAError(
            "a choice needs at least two adapters and the data of a task, got "
            f"{len(adapters)} and {len(data)}."
        )
    if rows < 1:
        raise DoRAError(f"rows must be at least 1, got {rows}.")
    loaded = [a if isinstance(a, Adapter) else load_adapter(a) for a in adapters]
    names = [
        str(a) if isinstance(a, str | Path) else f"adapter {i}"
        for i, a in enumerate(adapters, 1)
    ]
    base, tokenizer = load(model)
    check_fit(base, loaded, names, check_base)
    tasks = [_read_task(name, tokenizer) for name in data]
    return choose_by(
        loaded,
        model=base,
        names=names,
        tasks=[(name, split) for name, (split, _) in zip(data, tasks, strict=True)],
        measure=partial(_measure, base, tasks, rows, max_seq_length, progress),
        candidates=candidates,
        rank=rank,
        seed=seed,
    )


def choose_by(
    adapters: Sequence[Adapter],
    *,
    model: nn.Module,
    names: Sequence[str],
    tasks: Sequence[tuple[str, str]],
    measure: Measure,
    candidates: Sequence[Candidate] | None = None,
    rank: int | None = None,
    seed: int = 0,
) -> MergeChoice:
    """Choose a merge as `choose_merge` does, by losses that `measure` returns.

    Args:
        adapters: Adapters of the model.
        model: The base.
        names: A name for each adapter.
        tasks: Name of the data and of the split of each task.
        measure: Returns the loss on each task, of an adapter or (for None) of the base.
            The second argument is a name for progress.
        candidates: As in `choose_merge`.
        rank: As in `choose_merge`.
        seed: As in `choose_merge`.

    Raises:
        DoRAError: If a loss of the base or of an adapter is not finite.
    """
    wanted = default_candidates(len(adapters)) if candidates is None else candidates
    first = measure(None, "base")
    labels = short_names([name for name, _ in tasks])
    choice = MergeChoice(
        adapters=tuple(short_names([*names])),
        tasks=tuple(
            TaskRows(name=label, split=split, rows=result.rows, tokens=result.tokens)
            for label, (_, split), result in zip(labels, tasks, first, strict=True)
        ),
        base=_finite(first, "the base"),
        alone=tuple(
            _finite(measure(adapter, name), name)
            for adapter, name in zip(adapters, names, strict=True)
        ),
        trials=(),
    )
    attempt = partial(_attempt, adapters, model, rank, seed, measure)
    for candidate in wanted:
        choice = _with(choice, attempt(candidate))
    choice = _tilted(choice, attempt)
    for warning in choice.warnings():
        logger.warning("%s", warning)
    return choice


def _with(choice: MergeChoice, trial: Trial) -> MergeChoice:
    return replace(choice, trials=(*choice.trials, trial))


def _tilted(choice: MergeChoice, attempt: Callable[[Candidate], Trial]) -> MergeChoice:
    """Give the worst task's best adapter more weight, as long as it helps."""
    for _ in range(_TILTS):
        best = choice.best
        task = choice.worst_task(best)
        own = [losses[task] for losses in choice.alone]
        if best.candidate.weights is None:
            return choice
        candidate = best.candidate.tilted(own.index(min(own)))
        if any(trial.candidate == candidate for trial in choice.trials):
            return choice
        choice = _with(choice, attempt(candidate))
        if choice.best is best:
            return choice
    return choice


def _attempt(
    adapters: Sequence[Adapter],
    base: nn.Module,
    rank: int | None,
    seed: int,
    measure: Measure,
    candidate: Candidate,
) -> Trial:
    """Merge and measure a candidate; a failure is recorded with its reason."""
    try:
        merged = merge_adapters_report(
            adapters,
            model=base,
            method=candidate.method,
            weights=candidate.weights,
            rank=rank,
            check_base=False,
            options=candidate.options(seed),
        ).adapter
        losses = _finite(measure(merged, candidate.name), "the merge")
    except DoRAError as error:
        return Trial(candidate=candidate, error=str(error))
    finally:
        mx.clear_cache()
    return Trial(candidate=candidate, losses=losses)


def _read_task(name: str, tokenizer: Any) -> tuple[str, Dataset]:
    """Return the split and the rows of a task, of which only answers are targets."""
    for split in _SPLITS:
        if read_splits(DataConfig(data=name), [split])[split]:
            return split, read_targets(FisherConfig(data=name, split=split), tokenizer)
    raise DoRAError(f"{name} has no rows: expected {' or '.join(_SPLITS)} data.")


def _measure(
    model: nn.Module,
    tasks: Sequence[tuple[str, Dataset]],
    rows: int,
    max_seq_length: int,
    progress: Progress | None,
    adapter: Adapter | None,
    name: str,
) -> list[LossResult]:
    """Return the loss on each task; the base is unchanged on return."""
    if adapter is not None:
        attach_adapter(model, adapter, check_base=False, name=name)
    try:
        return [
            _task_loss(model, dataset, rows, max_seq_length, progress, name)
            for _, dataset in tasks
        ]
    finally:
        remove_dora(model)


def _task_loss(
    model: nn.Module,
    dataset: Dataset,
    rows: int,
    max_seq_length: int,
    progress: Progress | None,
    name: str,
) -> LossResult:
    wanted = min(rows, len(dataset))
    size = min(_BATCH, wanted)
    total = -(-wanted // size) * size

    def report(count: int) -> None:
        if progress is not None:
            progress(name, min(total, len(dataset)), count)

    return evaluate_loss(
        model,
        dataset,
        batch_size=size,
        max_seq_length=max_seq_length,
        num_batches=total // size,
        progress=report,
    )


def _finite(results: Sequence[LossResult], name: str) -> tuple[float, ...]:
    losses = tuple(result.loss for result in results)
    if not all(map(math.isfinite, losses)):
        raise DoRAError(f"the loss of {name} is not finite: {losses}.")
    return losses
