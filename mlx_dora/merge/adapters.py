"""Several adapters of one base as one ordinary adapter."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_dora.adapters.adapter import LEAVES, Adapter, BaseModel, rank_of
from mlx_dora.adapters.attach import all_problems
from mlx_dora.adapters.config import DoRAConfig
from mlx_dora.adapters.files import load_adapter, save_adapter
from mlx_dora.adapters.hosting import load_lazily
from mlx_dora.adapters.keys import natural_order
from mlx_dora.adapters.matrices import (
    adapted_matrices,
    adapter_tensors,
    named_matrices,
)
from mlx_dora.adapters.refusals import check_cut
from mlx_dora.data.batches import Examples
from mlx_dora.errors import DoRAError
from mlx_dora.io.atomic import check_output
from mlx_dora.io.finite import all_finite, refuse_not_finite
from mlx_dora.io.output import Inputs
from mlx_dora.layers import weight_of
from mlx_dora.matrix import Adapted, Weight
from mlx_dora.matrix.weight import dense
from mlx_dora.merge.cut_error import add_logit_errors
from mlx_dora.merge.dense import Options, factor, merge_apart, row_norm
from mlx_dora.merge.factored import NOT_FINITE, MergedMatrix, merge_matrix
from mlx_dora.merge.fisher import Fisher, check_fishers, check_paths
from mlx_dora.merge.informed import merge_informed
from mlx_dora.merge.names import ADAPTER_METHODS, ELEMENTWISE, FISHER, NORMALIZED
from mlx_dora.merge.report import AdapterMerge, MergedLayer
from mlx_dora.merge.weights import Weights, check_weights, row_weights

Progress = Callable[[str, int, int], None]
"""(what is being done, total, newly done)."""


def merge_adapters(
    adapters: Sequence[Adapter | str | Path],
    *,
    model: nn.Module | str | Path,
    method: str = "slerp",
    weights: Weights | None = None,
    rank: int | None = None,
    save_path: str | Path | None = None,
    overwrite: bool = False,
    check_base: bool = True,
    density: float | None = None,
    seed: int = 0,
    scale: float = 1.0,
    fisher: Sequence[Fisher | str | Path] | None = None,
) -> Adapter:
    """Merge DoRA and LoRA adapters of one base into one DoRA adapter.

    ``slerp``, ``karcher``, ``nmean``, ``magnitude_weighted``, ``linear`` and
    ``task_arithmetic`` are exact and build no dense weight, and so is ``fisher`` by
    row; ``ties``, ``dare``, ``dare_ties``, ``tsv`` and ``fisher`` by element take one
    dense matrix at a time and a truncated SVD. Definitions: ``docs/merging.md``.

    Args:
        adapters: Folders or adapters; ranks, scales and modules may differ. A module
            that an adapter does not have counts as the base's there.
        model: The base: the module itself, or its folder or Hub id.
        method: How to merge.
        weights: One an adapter (a number, or an array with one a row), or patterns of
            module paths to such lists; equal if None. Adapters with weight 0 do not
            count, and one alone comes back unchanged.
        rank: Cut the merged updates to this rank, or the rank of the truncated SVD; if
            None, the sum of the ranks.
        save_path: Folder to write the adapter to.
        overwrite: Replace an existing folder.
        check_base: Refuse an adapter that was trained on another base, or on another
            quantisation of it.
        density: Share of the entries that ties, dare and dare_ties keep.
        seed: Of dare's random numbers.
        scale: λ on the merged task vectors of the methods that have them.
        fisher: For that method, the Fisher information of each adapter: what
            `mlx_dora.merge.estimate_fisher` gives, or folders of it.

    Returns:
        The merged adapter.

    Raises:
        DoRAError: If an adapter does not fit the base, an argument is bad, or the
            output exists.
    """
    return merge_adapters_report(
        adapters,
        model=model,
        method=method,
        weights=weights,
        rank=rank,
        save_path=save_path,
        overwrite=overwrite,
        check_base=check_base,
        options=Options(density=density, seed=seed, scale=scale),
        fisher=fisher,
    ).adapter


def merge_adapters_report(
    adapters: Sequence[Adapter | str | Path],
    *,
    model: nn.Module | str | Path,
    method: str = "slerp",
    weights: Weights | None = None,
    rank: int | None = None,
    save_path: str | Path | None = None,
    overwrite: bool = False,
    check_base: bool = True,
    options: Options | None = None,
    fisher: Sequence[Fisher | str | Path] | None = None,
    probe: Examples | None = None,
    inputs: Inputs = (),
    progress: Progress | None = None,
) -> AdapterMerge:
    """`merge_adapters`, with what was done to each matrix.

    With `rank` and a `probe`, of rows of data, also with how far cutting the rank moves
    the logits on some of these. `inputs` are further files and folders that the output
    must not replace, hold or lie in.
    """
    options = options or Options()
    _check_arguments(adapters, method, weights, rank)
    fishers = check_fishers(method, fisher, len(adapters))
    given = [*adapters, model, *(fisher or ())]
    inputs = (*inputs, *(one for one in given if isinstance(one, str | Path)))
    if save_path is not None:
        check_output(save_path, inputs=inputs, overwrite=overwrite)
    names = [one if isinstance(one, str | Path) else "" for one in adapters]
    loaded = [
        one if isinstance(one, Adapter) else load_adapter(one) for one in adapters
    ]
    base = model if isinstance(model, nn.Module) else load_lazily(model)
    _check_fit(base, loaded, names, check_base)
    paths = sorted({p for one in loaded for p in one.paths}, key=natural_order)
    modules = dict(base.named_modules())
    check_paths(fishers, modules)
    if rank is not None:
        check_cut(modules, paths, rank)
    target = next((one.config.scale for one in loaded if one.config.scale), 1.0)

    def merged_at(rank: int | None) -> AdapterMerge:
        tensors: dict[str, mx.array] = {}
        layers = []
        for path in paths:
            weight, normalize = weight_of(modules[path]), method in NORMALIZED
            columns = [adapted_matrices(one, path, modules[path]) for one in loaded]
            rows = weight.shape[-2]
            shares = row_weights(weights, path, len(loaded), rows, normalize=normalize)
            parts = []
            named = named_matrices(path, weight)
            for (name, matrix), *inputs in zip(named, *columns, strict=True):
                known = [one.read(path, matrix.shape) for one in fishers]
                try:
                    merged = _merge_matrix(
                        matrix, inputs, shares, method, rank, target, options, known
                    )
                except DoRAError as error:
                    raise DoRAError(f"{name}: {error}") from error
                parts.append({n: getattr(merged, n) for n in LEAVES["dora"]})
                layers.append(_report(path, name, merged, loaded))
            tensors |= adapter_tensors(path, modules[path], weight, parts)
            if progress is not None:
                progress("merge", len(paths), 1)
        return AdapterMerge(
            adapter=_adapter(loaded, tensors, paths, method, target, names),
            method=method,
            layers=tuple(layers),
            count=len(loaded),
        )

    found = merged_at(rank)
    if rank is not None and probe is not None:
        full = merged_at(None).adapter
        found = add_logit_errors(found, full, base, probe, progress=progress)
    only = _only_one(loaded, weights, paths)
    if only is not None and rank is None and method in NORMALIZED:
        found = replace(found, adapter=only)
    refuse_not_finite(found.adapter.tensors, "the merged adapter")
    if save_path is not None:
        save_adapter(found.adapter, save_path, inputs=inputs, overwrite=overwrite)
    return found


def _report(
    path: str, name: str, merged: MergedMatrix, adapters: Sequence[Adapter]
) -> MergedLayer:
    return MergedLayer(
        path=path,
        name=name,
        inputs=sum(f"{path}.lora_a" in one.tensors for one in adapters),
        rank=merged.rank,
        opposed=merged.opposed,
        recomputed=merged.recomputed,
        zero=merged.zero,
        discarded=merged.discarded,
        unknown=merged.unknown,
    )


def _check_arguments(
    adapters: Sequence[object], method: str, weights: Weights | None, rank: int | None
) -> None:
    if method not in ADAPTER_METHODS:
        raise DoRAError(
            f"no merge method {method!r} for adapters: {', '.join(ADAPTER_METHODS)}."
        )
    if not adapters:
        raise DoRAError("give at least one adapter to merge.")
    if method == "slerp" and len(adapters) > 2:
        raise DoRAError(
            f"slerp takes two adapters, got {len(adapters)}; karcher and nmean take "
            "more."
        )
    if rank is not None and (type(rank) is not int or rank < 1):
        raise DoRAError(f"rank must be a whole number of at least 1, got {rank!r}.")
    check_weights(weights, len(adapters))


def _check_fit(
    model: nn.Module,
    adapters: Sequence[Adapter],
    names: Sequence[str | Path],
    check_base: bool,
) -> None:
    for i, (adapter, name) in enumerate(zip(adapters, names, strict=True)):
        if adapter.fine_tune_type == "full":
            raise DoRAError(
                f"{name or f'adapter {i + 1}'} holds fully fine-tuned weights: merge "
                "them as models, or extract an adapter first."
            )
        if problems := all_problems(model, adapter, check_base):
            raise DoRAError(
                f"{name or f'adapter {i + 1}'} does not fit the model: "
                f"{'; '.join(problems)}."
            )


def _merge_matrix(
    weight: Weight,
    inputs: Sequence[Adapted],
    shares: np.ndarray,
    method: str,
    rank: int | None,
    target: float,
    options: Options,
    known: Sequence[mx.array | None],
) -> MergedMatrix:
    if method in NORMALIZED:
        counts = np.flatnonzero(shares.any(0)).tolist()
        inputs, shares = [inputs[i] for i in counts], shares[:, counts]
        known = [known[i] for i in counts] if known else known
        only = inputs[0]
        if len(inputs) == 1 and rank is None and only.m is not None:
            # Unchanged but for the one scale that a folder has.
            up = only.update.lora_b * (only.update.scale / target)
            return MergedMatrix(
                lora_a=only.update.lora_a,
                lora_b=only.update.lora_b if only.update.scale == target else up,
                m=only.m,
                scale=target,
            )
    if method == FISHER:
        return merge_informed(weight, inputs, shares, known, scale=target, rank=rank)
    if method not in ELEMENTWISE:
        if method == "task_arithmetic":
            shares = options.scale * shares
        return merge_matrix(
            weight, inputs, shares, method=method, scale=target, rank=rank
        )
    if np.ptp(shares, axis=0).any():
        raise DoRAError(f"{method} takes one weight an adapter, not one a row.")
    base = dense(weight).astype(mx.float32)
    directions, magnitudes = [], []
    for one in inputs:
        update = one.update
        directions.append(base + update.rows(slice(None)))
        if not all_finite(directions[-1]):
            raise DoRAError(NOT_FINITE)
        magnitudes.append(row_norm(directions[-1]) if one.m is None else one.m)
    direction, magnitude = merge_apart(
        method, base, directions, magnitudes, [float(v) for v in shares[0]], options
    )
    total = sum(one.update.lora_a.shape[1] for one in inputs)
    return factor(
        base, direction, magnitude, scale=target, rank=rank or total, rescale=False
    )


def _only_one(
    adapters: Sequence[Adapter], weights: Weights | None, paths: Sequence[str]
) -> Adapter | None:
    """The adapter that alone has a weight everywhere, if there is one."""
    counted: set[int] = set()
    for path in paths:
        # Weights that differ by row never leave one adapter alone.
        try:
            shares = row_weights(weights, path, len(adapters), 1, normalize=True)
        except DoRAError:
            return None
        counted.update(np.flatnonzero(shares[0]).tolist())
    return adapters[counted.pop()] if len(counted) == 1 else None


def _adapter(
    adapters: Sequence[Adapter],
    tensors: dict[str, mx.array],
    paths: Sequence[str],
    method: str,
    scale: float,
    names: Sequence[str | Path],
) -> Adapter:
    ranks = {path: rank_of("lora_a", tensors[f"{path}.lora_a"]) for path in paths}
    depths = [one.config.num_layers for one in adapters]
    bases = {one.base for one in adapters}
    config = DoRAConfig(
        rank=max(ranks.values()),
        scale=scale,
        keys=tuple(ranks),
        num_layers=-1 if -1 in depths else max(depths),
        rank_pattern=ranks if len(set(ranks.values())) > 1 else None,
    )
    return Adapter(
        config=config,
        tensors=tensors,
        base=bases.pop() if len(bases) == 1 else _common_base(bases),
        training={"merged": {"method": method, "adapters": [str(n) for n in names]}},
    )


def _common_base(bases: set[BaseModel]) -> BaseModel:
    fingerprints = {one.fingerprint for one in bases} - {None}
    models = {one.model for one in bases} - {None}
    return BaseModel(
        model=models.pop() if len(models) == 1 else None,
        fingerprint=fingerprints.pop() if len(fingerprints) == 1 else None,
    )
