"""Whole models as one, streamed: one tensor at a time, nothing half-written."""

import json
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_dora.adapters.adapter import listed
from mlx_dora.adapters.hosting import model_folder
from mlx_dora.adapters.keys import natural_order
from mlx_dora.errors import DoRAError
from mlx_dora.io.atomic import check_output
from mlx_dora.io.checkpoint import MAX_SHARD_BYTES, ShardWriter
from mlx_dora.io.output import Inputs
from mlx_dora.io.resumable import resumable_directory
from mlx_dora.merge.checkpoint import ModelTensors
from mlx_dora.merge.fisher import Fisher, check_fishers, check_paths
from mlx_dora.merge.model_tensor import merge_one
from mlx_dora.merge.plan import MergePlan, plan_models
from mlx_dora.merge.report import MergedTensor, MergeReport
from mlx_dora.merge.settings import count_blocks
from mlx_dora.merge.weights import Weights

Progress = Callable[[str, int, int], None]
"""(what is being done, total, newly done)."""

# Bytes that MLX may keep for blocks to come; what whole tensors leave is more.
_KEPT = 1 << 28
_WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json")


def merge_models(
    models: Sequence[str | Path],
    *,
    save_path: str | Path,
    base: str | Path | None = None,
    method: str = "slerp",
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
    `mlx_dora.merge.methods`. The base, or else the first model, is the pattern: its
    config, tokenizer, dtypes and packing are the output's. Rules:
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
        inputs: What the plan was read from; the models and Fisher folders count anyway.
        overwrite: Replace an existing folder.
        max_shard_bytes: Size of the weight files.
        progress: Called as the work goes on.
    """
    started = time.perf_counter()
    given = [*plan.models, plan.base, *(plan.fisher or ()), *inputs]
    check_output(save_path, inputs=given, overwrite=overwrite)
    fishers = check_fishers(plan.method, plan.fisher, len(plan.models))
    folders = [model_folder(one) for one in plan.models]
    base_folder = None if plan.base is None else model_folder(plan.base)
    every = folders if base_folder is None else [*folders, base_folder]
    given += every
    check_output(save_path, inputs=given, overwrite=overwrite)
    opened = {folder: ModelTensors(folder) for folder in every}
    sources = [opened[one] for one in folders]
    base = None if base_folder is None else opened[base_folder]
    pattern = base or sources[0]
    _check_fit(pattern, sources, plan.pad)
    names = sorted(pattern.names, key=natural_order)
    check_paths(fishers, [name.removesuffix(".weight") for name in names])
    blocks = count_blocks(names)
    mx.reset_peak_memory()
    told: list[MergedTensor] = []
    job = _job(plan, opened.values(), fishers)
    with resumable_directory(save_path, job, inputs=given, overwrite=overwrite) as out:
        with ShardWriter(out, max_shard_bytes=max_shard_bytes, resume=True) as writer:
            resumed = writer.written
            for name in names:
                if name not in resumed:
                    known = _known(name, pattern, fishers)
                    one = merge_one(
                        writer, name, plan, pattern, base, sources, blocks, known
                    )
                    told.append(one)
                    if mx.get_cache_memory() > _KEPT:
                        mx.clear_cache()
                if progress is not None:
                    progress("merge", len(names), 1)
        _copy_files(pattern, out, plan.dtype, names, sources)
    return MergeReport(
        method=plan.method,
        models=plan.models,
        tensors=tuple(told),
        resumed=len(names) - len(told),
        peak_bytes=mx.get_peak_memory(),
        seconds=time.perf_counter() - started,
    )


def _known(
    name: str, pattern: ModelTensors, fishers: Sequence[Fisher]
) -> list[mx.array | None]:
    path, shape = name.removesuffix(".weight"), pattern.shape(name)
    return [one.read(path, shape) for one in fishers]


def _check_fit(
    pattern: ModelTensors, inputs: Sequence[ModelTensors], pad: bool
) -> None:
    """Refuse models that differ in names or shapes, all of it in one message."""
    own = set(pattern.names)
    kind = pattern.config.get("model_type")
    for one in inputs:
        if one is pattern:
            continue
        other = one.config.get("model_type")
        if other != kind:
            raise DoRAError(
                f"{one.folder} is a {other} model and {pattern.folder} a {kind} model: "
                "their tensors do not mean the same."
            )
        names = set(one.names)
        problems = listed("missing:", sorted(own - names, key=natural_order))
        problems += listed("extra:", sorted(names - own, key=natural_order))
        unlike = [
            f"{name} {one.shape(name)} for {pattern.shape(name)}"
            for name in sorted(own & names, key=natural_order)
            if one.shape(name) != pattern.shape(name)
            and not (pad and _is_vocabulary(name, one, pattern))
        ]
        problems += listed("other shapes:", unlike)
        if unlike and all(
            _is_vocabulary(name.split(" ")[0], one, pattern) for name in unlike
        ):
            problems.append("the vocabularies differ: say pad (--pad) to merge them")
        if problems:
            raise DoRAError(
                f"{one.folder} does not fit {pattern.folder}: {'; '.join(problems)}."
            )


def _is_vocabulary(name: str, one: ModelTensors, pattern: ModelTensors) -> bool:
    first, second = one.shape(name), pattern.shape(name)
    sizes = one.config.get("vocab_size"), pattern.config.get("vocab_size")
    has_sizes = bool(first) and bool(second) and (first[0], second[0]) == sizes
    return has_sizes and first[1:] == second[1:]


def _job(
    plan: MergePlan, opened: Iterable[ModelTensors], fishers: Sequence[Fisher]
) -> str:
    """All that determines the output; inputs by path, size and time of change."""
    files = []
    for one in opened:
        for path in sorted(one.folder.glob("*.safetensors")):
            state = path.stat()
            files.append([str(path.resolve()), state.st_size, state.st_mtime_ns])
    facts = [asdict(one.facts) for one in fishers]
    return json.dumps([asdict(plan), files, facts], default=_plain)


def _plain(value: mx.array | np.ndarray) -> list[float]:
    return np.array(value, np.float64).tolist()


def _copy_files(
    pattern: ModelTensors,
    out: Path,
    dtype: str | None,
    names: Sequence[str],
    inputs: Sequence[ModelTensors],
) -> None:
    """Config, tokenizer and whatever else is not weights, from the pattern."""
    for path in sorted(pattern.folder.iterdir()):
        if path.is_file() and not path.name.endswith(_WEIGHT_FILES):
            shutil.copyfile(path, out / path.name)
    config = dict(pattern.config)
    if dtype is not None:
        for key in ("dtype", "torch_dtype"):
            if key in config:
                config[key] = dtype
    if "vocab_size" in config:
        sizes = [one.config.get("vocab_size", 0) for one in (pattern, *inputs)]
        config["vocab_size"] = max(sizes)
    (out / "config.json").write_text(json.dumps(config, indent=4), encoding="utf-8")
