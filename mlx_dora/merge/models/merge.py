"""Merges whole models, streaming one tensor at a time; output appears when complete."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_dora.io.atomic import atomic_directory, check_output
from mlx_dora.io.checkpoint import MAX_SHARD_BYTES, ShardWriter
from mlx_dora.io.output import Inputs
from mlx_dora.merge.methods import DEFAULT
from mlx_dora.merge.models.files import copy_files, put_tokenizer
from mlx_dora.merge.models.model_tensor import Job
from mlx_dora.merge.models.opened import OpenedMerge, open_merge
from mlx_dora.merge.models.place import Place
from mlx_dora.merge.models.plan import MergePlan, plan_models
from mlx_dora.merge.models.report import MergedTensor, MergeReport
from mlx_dora.merge.weights import Weights
from mlx_dora.progress import Progress

# Bytes that MLX may cache for further blocks; whole tensors would leave more.
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

    ``slerp``, ``karcher``, ``nmean`` and ``magnitude_weighted`` merge the length and
    the direction of each output row separately; with a base, the first three merge
    changes from it. Norm weights and biases get the weighted mean, and so do tensors
    without information under ``fisher``. ``linear``, ``task_arithmetic``, ``ties``,
    ``dare``, ``tsv`` and the other methods of blocks are defined in
    `mlx_dora.merge.methods`. The base, or else the first model, is the
    pattern: the output has its config, tokenizer, dtypes and packing. See
    ``docs/merging.md`` for the rules.

    A killed merge resumes when it is called again with the same arguments.

    Args:
        models: Folders or Hub ids of the models to merge.
        save_path: Output folder.
        base: Folder or Hub id of the base that changes are relative to.
        method: Name of the merge method.
        weights: One per model (a number, or an array with one number per row), or a
            mapping from patterns of module paths to such lists; None for equal weights.
        parameters: ``density``, ``normalize`` and ``lambda`` (numbers, gradients over
            the blocks, or filters as in mergekit), ``seed``, ``granularity`` (``row``,
            or ``tensor`` for mergekit's definitions), ``pad`` (merge
            embeddings of different vocabulary sizes), and the parameters of single
            methods, such as ``gamma`` of ``breadcrumbs``.
        dtype: Dtype of the output: ``float32``, ``float16`` or ``bfloat16``; None for
            the pattern's.
        fisher: Folders of Fisher information, one per model, for method ``fisher``.
        overwrite: Replace an existing folder.

    Returns:
        A report on the merge.

    Raises:
        DoRAError: If an input is invalid, the models do not match, or the output
            exists.
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

    The output does not replace files in `inputs` or the plan's own inputs.
    """
    started = time.perf_counter()
    check_output(save_path, inputs=[*plan.inputs, *inputs], overwrite=overwrite)
    opened = open_merge(plan)
    given = [*plan.inputs, *inputs, *opened.folders]
    check_output(save_path, inputs=given, overwrite=overwrite)
    mx.reset_peak_memory()
    key = _state(plan, opened)
    with atomic_directory(save_path, inputs=given, overwrite=overwrite, job=key) as out:
        with ShardWriter(out, max_shard_bytes=max_shard_bytes, resume=True) as writer:
            merged = _merge_all(opened.places, writer, progress)
        copy_files(opened.pattern, out, opened.config)
        put_tokenizer(out, opened.tokenizer)
    return MergeReport(
        method=plan.method,
        models=plan.models,
        tensors=tuple(merged),
        resumed=len(opened.places) - len(merged),
        peak_bytes=mx.get_peak_memory(),
        seconds=time.perf_counter() - started,
        notes=tuple(opened.notes),
    )


def _merge_all(
    places: Sequence[tuple[Job, Place]],
    writer: ShardWriter,
    progress: Progress | None,
) -> list[MergedTensor]:
    """Merge every tensor that has not been written yet."""
    resumed, merged = writer.written, []
    for job, place in places:
        if place.name not in resumed:
            merged.append(job.merge(place, writer))
            if mx.get_cache_memory() > _KEPT:
                mx.clear_cache()
        if progress is not None:
            progress("merge", len(places), 1)
    return merged


def _state(plan: MergePlan, opened: OpenedMerge) -> str:
    """Everything that determines the output; inputs by path, size and modified time."""
    files = []
    for path in opened.files:
        state = path.stat()
        files.append([str(path.resolve()), state.st_size, state.st_mtime_ns])
    facts = [asdict(fisher.facts) for fisher in opened.fishers]
    return json.dumps([asdict(plan), files, facts], default=_plain)


def _plain(value: mx.array | np.ndarray) -> list[float]:
    return np.array(value, np.float64).tolist()
