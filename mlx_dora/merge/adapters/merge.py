"""Merges several adapters of one base into one ordinary adapter."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_dora.adapters.adapter import LEAVES, Adapter
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
from mlx_dora.io.finite import refuse_not_finite
from mlx_dora.io.output import Inputs
from mlx_dora.layers import weight_of
from mlx_dora.merge.adapters.cut_error import add_logit_errors
from mlx_dora.merge.adapters.dense import Options
from mlx_dora.merge.adapters.fit import check_arguments, check_fit
from mlx_dora.merge.adapters.matrix import merge_one
from mlx_dora.merge.adapters.report import (
    AdapterMerge,
    MergedLayer,
    layer_report,
)
from mlx_dora.merge.adapters.result import merged_adapter
from mlx_dora.merge.fisher.information import Fisher, check_fishers, check_paths
from mlx_dora.merge.methods import DEFAULT, method_named
from mlx_dora.merge.weights import Weights, row_weights
from mlx_dora.progress import Progress


def merge_adapters(
    adapters: Sequence[Adapter | str | Path],
    *,
    model: nn.Module | str | Path,
    method: str = DEFAULT,
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

    Row methods are exact and build no dense weight. The others, and ``fisher`` by
    element, build one dense matrix at a time and use a truncated SVD. See
    ``docs/merging.md`` for the definitions.

    Args:
        adapters: Folders or adapters; ranks, scales and modules may differ. An adapter
            that lacks a module counts as the base there.
        model: The base model, or its folder or Hub id.
        method: Name of the merge method.
        weights: One per adapter (a number, or an array with one number per row), or a
            mapping from patterns of module paths to such lists; None for equal
            weights. A mean ignores adapters with weight 0, and returns a single
            remaining adapter unchanged.
        rank: Maximum rank of the merged updates; None for the sum of the ranks.
        save_path: Folder to write the adapter to.
        overwrite: Replace an existing folder.
        check_base: Refuse an adapter that was trained on another base, or on another
            quantization of it.
        density: Fraction of the changes to keep, for methods that drop some; None for
            the method's default.
        seed: Random seed of DARE.
        scale: Factor λ on the merged task vectors, for methods that use them.
        fisher: Fisher information of each adapter, for method ``fisher``: results of
            `mlx_dora.merge.estimate_fisher`, or folders.

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
    method: str = DEFAULT,
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
    """Run `merge_adapters` and report on each matrix.

    Args:
        adapters: Folders or adapters.
        model: The base model, or its folder or Hub id.
        method: Name of the merge method.
        weights: Weights of the adapters.
        rank: Maximum rank of the merged updates.
        save_path: Folder to write the adapter to.
        overwrite: Replace an existing folder.
        check_base: Refuse an adapter that was trained on another base.
        options: Settings of the method.
        fisher: Fisher information of each adapter.
        probe: Rows of data; with `rank`, measure on some of them how much the cut
            changes the logits.
        inputs: Further files and folders that the output must not replace, contain or
            lie in.
        progress: Progress callback.
    """
    options = options or Options()
    check_arguments(adapters, method, weights, rank, options)
    fishers = check_fishers(method, fisher, len(adapters))
    given = [*adapters, model, *(fisher or ())]
    inputs = (*inputs, *(source for source in given if isinstance(source, str | Path)))
    if save_path is not None:
        check_output(save_path, inputs=inputs, overwrite=overwrite)
    loaded = [
        source if isinstance(source, Adapter) else load_adapter(source)
        for source in adapters
    ]
    base = model if isinstance(model, nn.Module) else load_lazily(model)
    names = [source if isinstance(source, str | Path) else "" for source in adapters]
    check_fit(base, loaded, names, check_base)
    job = _Job(
        adapters=loaded,
        names=[str(name) for name in names],
        modules=dict(base.named_modules()),
        method=method,
        weights=weights,
        options=options,
        fishers=fishers,
        progress=progress,
    )
    check_paths(fishers, job.modules)
    if rank is not None:
        check_cut(job.modules, job.paths, rank)
    report = job.merged(rank)
    if rank is not None and probe is not None:
        full = job.merged(None).adapter
        report = add_logit_errors(report, full, base, probe, progress=progress)
    only = job.only_one()
    if only is not None and rank is None:
        report = replace(report, adapter=only)
    refuse_not_finite(report.adapter.tensors, "the merged adapter")
    if save_path is not None:
        save_adapter(report.adapter, save_path, inputs=inputs, overwrite=overwrite)
    return report


@dataclass(frozen=True, kw_only=True)
class _Job:
    """A merge of loaded adapters.

    Attributes:
        adapters: The N adapters.
        names: Their folders; empty for adapters in memory.
        modules: Modules of the base by path.
        method: Name of the method.
        weights: As given to `merge_adapters`.
        options: Settings of the method.
        fishers: Fisher information of each adapter; empty if not used.
        progress: Called after each module.
    """

    adapters: list[Adapter]
    names: list[str]
    modules: dict[str, nn.Module]
    method: str
    weights: Weights | None
    options: Options
    fishers: list[Fisher]
    progress: Progress | None

    @cached_property
    def paths(self) -> list[str]:
        """Paths of the modules that any adapter has, in natural order."""
        every = {path for adapter in self.adapters for path in adapter.paths}
        return sorted(every, key=natural_order)

    @cached_property
    def scale(self) -> float:
        """Multiplier of the merged adapter: the first nonzero scale of the inputs."""
        return next(
            (s for adapter in self.adapters if (s := adapter.config.scale)), 1.0
        )

    def merged(self, rank: int | None) -> AdapterMerge:
        """Merge every module; cut the updates to `rank` if it is not None."""
        tensors: dict[str, mx.array] = {}
        layers: list[MergedLayer] = []
        for path in self.paths:
            tensors |= self._module(path, rank, layers)
            if self.progress is not None:
                self.progress("merge", len(self.paths), 1)
        note = method_named(self.method).note_of(self.options.density)
        return AdapterMerge(
            adapter=merged_adapter(
                self.adapters, tensors, self.paths, self.method, self.scale, self.names
            ),
            method=self.method,
            layers=tuple(layers),
            count=len(self.adapters),
            notes=() if note is None else (note,),
        )

    def _module(
        self, path: str, rank: int | None, layers: list[MergedLayer]
    ) -> dict[str, mx.array]:
        """Merge one module, expert by expert, and append reports to `layers`."""
        module = self.modules[path]
        weight = weight_of(module)
        columns = [adapted_matrices(adapter, path, module) for adapter in self.adapters]
        shares = row_weights(
            self.weights,
            path,
            len(self.adapters),
            weight.shape[-2],
            normalize=method_named(self.method).is_mean,
        )
        parts = []
        named = named_matrices(path, weight)
        for (name, matrix), *inputs in zip(named, *columns, strict=True):
            known = [fisher.read(path, matrix.shape) for fisher in self.fishers]
            try:
                merged = merge_one(
                    matrix,
                    inputs,
                    shares,
                    self.method,
                    rank,
                    self.scale,
                    self.options,
                    known,
                )
            except DoRAError as error:
                raise DoRAError(f"{name}: {error}") from error
            parts.append({n: getattr(merged, n) for n in LEAVES["dora"]})
            layers.append(layer_report(path, name, merged, self.adapters))
        return adapter_tensors(path, module, weight, parts)

    def only_one(self) -> Adapter | None:
        """The only adapter with nonzero weights in a mean; None for several."""
        if not method_named(self.method).is_mean:
            return None
        counted: set[int] = set()
        for path in self.paths:
            # Weights by row always use several adapters.
            try:
                shares = row_weights(
                    self.weights, path, len(self.adapters), 1, normalize=True
                )
            except DoRAError:
                return None
            counted.update(np.flatnonzero(shares[0]).tolist())
        return self.adapters[counted.pop()] if len(counted) == 1 else None
