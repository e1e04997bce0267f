"""Whole models as one, streamed: one tensor at a time, nothing half-written."""

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_dora.adapters.hosting import model_folder
from mlx_dora.adapters.keys import natural_order
from mlx_dora.io.atomic import check_output
from mlx_dora.io.checkpoint import MAX_SHARD_BYTES, ShardWriter
from mlx_dora.io.output import Inputs
from mlx_dora.io.resumable import resumable_directory
from mlx_dora.merge.fisher.information import Fisher, check_fishers, check_paths
from mlx_dora.merge.methods import DEFAULT
from mlx_dora.merge.models.files import choose_tokenizer, copy_files, put_tokenizer
from mlx_dora.merge.models.fit import check_fit, notes_of_copies
from mlx_dora.merge.models.model_tensor import merge_one
from mlx_dora.merge.models.model_tensors import ModelTensors
from mlx_dora.merge.models.plan import MergePlan, plan_models
from mlx_dora.merge.models.report import MergedTensor, MergeReport
from mlx_dora.merge.models.settings import count_blocks
from mlx_dora.merge.weights import Weights
from mlx_dora.progress import Progress

# Bytes that MLX may keep for blocks to come; what whole tensors leave is more.
_KEPT = 1 << 28


def merge_models(
    models: Sequence[str | Path],
    *,
    save_path: str | Path,
    base: str | Path | None = None,
    method: str = DEFAULT,
    weights: Weights | None = None,
    parameters: Mapping[str, Any] | None = None,
    dtype: str | None = None,
    fisher: Sequence[str | Path] | None = None,
    overwrite: bool = False,
) -> MergeReport:
    """Merge whole models into a folder that mlx-lm loads.

    Row by row: the length and the direction of each output row apart (``slerp``,
    ``karcher``, ``nmean``, ``magnitude_weighted``; with a base, the first three merge
    the changes of it). Norm weights and biases get the weighted mean, and so does what
    ``fisher`` has no information of. ``linear``,
    ``task_arithmetic``, ``ties``, ``dare``, ``dare_ties`` and ``tsv`` as in
    `mlx_dora.merge.methods.elementwise`. The base, or else the first model, is the
    pattern: its config, tokenizer, dtypes and packing are the output's. Rules:
    ``docs/merging.md``.

    A merge that was killed goes on where it stopped when it is called again alike.

    Args:
        models: Folders or Hub ids; the models that are merged.
        save_path: The folder to make.
        base: What changes are relative to.
        method: How to merge.
        weights: One a model (a number, or an array with one a row), or patterns of
            module paths to such lists; equal if None.
        parameters: ``density``, ``normalize`` and ``lambda`` (numbers, gradients over
            the blocks, or filters as in mergekit), ``seed``, ``granularity`` (``row``,
            or ``tensor`` for mergekit's definitions), ``pad`` (embeddings of unlike
            vocabularies).
        dtype: Of the output: ``float32``, ``float16`` or ``bfloat16``; the pattern's if
            None.
        fisher: Folders of Fisher information, one a model, for that method.
        overwrite: Replace an existing folder.

    Returns:
        What was done.

    Raises:
        DoRAError: If an input is not in order, the models do not fit together, or the
            output exists.
    """
    plan = plan_models(
        models,
        base=base,
        method=method,
        weights=weights,
        parameters=parameters,
        dtype=dtype,
        fisher=fisher,
    )
    return run_merge(plan, save_path, overwrite=overwrite)


def run_merge(
    plan: MergePlan,
    save_path: str | Path,
    *,
    inputs: Inputs = (),
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
) -> MergeReport:
    """Carry out a plan; see `merge_models`.

    Args:
        plan: Names the models and what is done with them.
        save_path: The folder to make.
        inputs: What the plan was read from; all folders that it names count anyway.
        overwrite: Replace an existing folder.
        max_shard_bytes: Size of the weight files.
        progress: Called as the work goes on.
    """
    started = time.perf_counter()
    given = [*plan.inputs, *inputs]
    check_output(save_path, inputs=given, overwrite=overwrite)
    fishers = check_fishers(plan.method, plan.fisher, len(plan.models))
    folders = {
        name: model_folder(name)
        for name in (*plan.models, plan.base)
        if name is not None
    }
    given += folders.values()
    check_output(save_path, inputs=given, overwrite=overwrite)
    opened = {folder: ModelTensors(folder) for folder in folders.values()}
    sources = [opened[folders[name]] for name in plan.models]
    base = None if plan.base is None else opened[folders[plan.base]]
    pattern = base or sources[0]
    check_fit(pattern, sources, plan.pad)
    notes = [*plan.notes, *notes_of_copies(pattern, sources)]
    check_paths(fishers, [name.removesuffix(".weight") for name in pattern.names])
    plan.check_blocks(count_blocks(pattern.names))
    choice = choose_tokenizer(plan, pattern, sources, notes)
    given.append(choice[0])
    mx.reset_peak_memory()
    job = _job(plan, opened.values(), fishers)
    with resumable_directory(save_path, job, inputs=given, overwrite=overwrite) as out:
        with ShardWriter(out, max_shard_bytes=max_shard_bytes, resume=True) as writer:
            merged = _merge_all(writer, plan, pattern, base, sources, fishers, progress)
        copy_files(pattern, out, plan.dtype, sources)
        put_tokenizer(out, *choice)
    return MergeReport(
        method=plan.method,
        models=plan.models,
        tensors=tuple(merged),
        resumed=len(pattern.names) - len(merged),
        peak_bytes=mx.get_peak_memory(),
        seconds=time.perf_counter() - started,
        notes=tuple(notes),
    )


def _merge_all(
    writer: ShardWriter,
    plan: MergePlan,
    pattern: ModelTensors,
    base: ModelTensors | None,
    inputs: Sequence[ModelTensors],
    fishers: Sequence[Fisher],
    progress: Progress | None,
) -> list[MergedTensor]:
    """Merge every tensor that is not written yet."""
    names = sorted(pattern.names, key=natural_order)
    blocks = count_blocks(names)
    resumed = writer.written
    done = []
    for name in names:
        if name not in resumed:
            known = _known(name, pattern, fishers)
            done.append(
                merge_one(writer, name, plan, pattern, base, inputs, blocks, known)
            )
            if mx.get_cache_memory() > _KEPT:
                mx.clear_cache()
        if progress is not None:
            progress("merge", len(names), 1)
    return done


def _known(
    name: str, pattern: ModelTensors, fishers: Sequence[Fisher]
) -> list[mx.array | None]:
    path, shape = name.removesuffix(".weight"), pattern.shape(name)
    return [fisher.read(path, shape) for fisher in fishers]


def _job(
    plan: MergePlan, opened: Iterable[ModelTensors], fishers: Sequence[Fisher]
) -> str:
    """All that determines the output; inputs by path, size and time of change."""
    files = []
    for model in opened:
        for path in sorted(model.folder.glob("*.safetensors")):
            state = path.stat()
            files.append([str(path.resolve()), state.st_size, state.st_mtime_ns])
    facts = [asdict(fisher.facts) for fisher in fishers]
    return json.dumps([asdict(plan), files, facts], default=_plain)


def _plain(value: mx.array | np.ndarray) -> list[float]:
    return np.array(value, np.float64).tolist()
