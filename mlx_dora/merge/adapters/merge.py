"""Merges several adapters of one base into one ordinary adapter."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import mlx.nn as nn
import numpy as np

from mlx_dora.adapters.adapter import Adapter
from mlx_dora.adapters.attach import all_problems
from mlx_dora.adapters.files import load_adapter, save_adapter
from mlx_dora.adapters.hosting import load_lazily
from mlx_dora.adapters.key_form import with_key_form
from mlx_dora.adapters.refusals import check_cut
from mlx_dora.data.batches import Examples
from mlx_dora.errors import DoRAError
from mlx_dora.io.atomic import check_output
from mlx_dora.io.finite import refuse_not_finite
from mlx_dora.merge.adapters.cut_error import add_logit_errors, open_probe
from mlx_dora.merge.adapters.dense import Options
from mlx_dora.merge.adapters.job import Job
from mlx_dora.merge.adapters.report import AdapterMerge
from mlx_dora.merge.fisher.estimate import estimate_on_data
from mlx_dora.merge.fisher.information import Fisher, check_fishers, check_paths
from mlx_dora.merge.methods import DEFAULT, MergeMethod, method_named
from mlx_dora.merge.methods.spaces import SPACES, space_named
from mlx_dora.merge.methods.table import names_in_spaces
from mlx_dora.merge.weights import Weights, check_weights
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
    parameters: Mapping[str, float] | None = None,
    space: str | None = None,
    magnitudes: str | None = None,
    calibrate: str | None = None,
    fisher: Sequence[Fisher | str | Path] | None = None,
) -> Adapter:
    """Merge DoRA and LoRA adapters of one base into one DoRA adapter.

    Row methods are exact and build no dense weight, and nor do the others in a space
    such as ``core``. In the space ``weight``, and ``fisher`` by element, one dense
    matrix at a time is built and cut by a truncated SVD. See ``docs/merging.md`` for
    the definitions.

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
        parameters: Parameters that only the method has, such as ``gamma`` of
            ``breadcrumbs``.
        space: Coordinates in which the method merges the updates, such as ``core``;
            None for the method's own.
        magnitudes: Rule for the merged magnitudes, such as ``mean``; None for the
            method's own.
        calibrate: Calibration of the updates before the merge, such as ``pico``; None
            for none.
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
        options=Options(
            density=density,
            seed=seed,
            scale=scale,
            own=dict(parameters or {}),
            space=space,
            magnitudes=magnitudes,
            calibrate=calibrate,
        ),
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
    data: Sequence[str] = (),
    probe: Examples | str | None = None,
    progress: Progress | None = None,
) -> AdapterMerge:
    """Run `merge_adapters` and report on each matrix.

    `data` names data of each adapter, on which to estimate its Fisher information.
    `probe` is rows, or a data set, on which to measure what the cut to `rank` changes.
    """
    options, entry = options or Options(), method_named(method)
    given = _checked(entry, len(adapters), weights, rank, options)
    if data and (fisher or not entry.needs_fisher):
        raise DoRAError(
            f"{method} does not use the adapters' data: give data only with method "
            "fisher, without fisher folders."
        )
    if probe is not None and rank is None:
        raise DoRAError("logit_error measures a rank cut: give a rank.")
    if probe is not None and options.space and space_named(options.space).needs_rank:
        raise DoRAError(
            f"logit_error measures a rank cut, and space {options.space} makes none: "
            "leave logit_error out."
        )
    fishers = [] if data else check_fishers(method, fisher, len(adapters))
    read = (*adapters, model, probe, *(fisher or ()), *data)
    inputs = tuple(source for source in read if isinstance(source, str | Path))
    if save_path is not None:
        check_output(save_path, inputs=inputs, overwrite=overwrite)
    loaded = [
        source if isinstance(source, Adapter) else load_adapter(source)
        for source in adapters
    ]
    names = [str(s) if isinstance(s, str | Path) else "" for s in adapters]
    base, probe = _opened(model, probe, bool(data))
    if data and not isinstance(model, nn.Module):
        fishers = estimate_on_data(model, loaded, names, data, check_base, progress)
    check_fit(base, loaded, names, check_base)
    modules = dict(base.named_modules())
    job = Job(loaded, names, modules, entry, given, options, fishers, progress)
    check_paths(fishers, job.modules)
    if rank is not None:
        check_cut(job.modules, job.paths, rank)
    report = job.merged(rank)
    if rank is not None and probe is not None:
        full = job.merged(None).adapter
        report = add_logit_errors(report, full, base, probe, progress)
    only = job.only_one()
    if only is not None and rank is None:
        report = replace(report, adapter=only)
    merged = report.adapter
    config = with_key_form(merged.config, base, merged.paths)
    report = replace(report, adapter=replace(merged, config=config))
    refuse_not_finite(report.adapter.tensors, "the merged adapter")
    if save_path is not None:
        save_adapter(report.adapter, save_path, inputs=inputs, overwrite=overwrite)
    return report


def _opened(
    model: nn.Module | str | Path, probe: Examples | str | None, reads_data: bool
) -> tuple[nn.Module, Examples | None]:
    """Load the base and the rows of the probe, if they are names."""
    if isinstance(probe, str):
        if not isinstance(model, nn.Module):
            return open_probe(model, probe)
        reads_data, probe = True, None
    if not isinstance(model, nn.Module):
        return load_lazily(model), probe
    if reads_data:
        raise DoRAError("reading data needs the base's folder or Hub id as model.")
    return model, probe


def _checked(
    method: MergeMethod,
    count: int,
    weights: Weights | None,
    rank: int | None,
    options: Options,
) -> dict[str, list[np.ndarray]]:
    """Refuse invalid settings of a merge; returns the weights by pattern."""
    if not count:
        raise DoRAError("give at least one adapter to merge.")
    # Any mean accepts a single adapter, and returns it unchanged.
    method.check_count(count, least=1 if method.is_mean else None)
    method.check_settings(options.beside_rule(), weights)
    _check_space(method, options.space, rank)
    if rank is not None and (type(rank) is not int or rank < 1):
        raise DoRAError(f"rank must be a whole number of at least 1, got {rank!r}.")
    return check_weights(weights, count)


def _check_space(method: MergeMethod, space: str | None, rank: int | None) -> None:
    """Refuse a space that the method cannot use, or one without its rank."""
    if space is not None and not method.takes_space:
        raise DoRAError(
            f"space {space} has no effect on {method.name}; it is for "
            f"{', '.join(names_in_spaces())}."
        )
    if space is not None or not method.is_exact:
        SPACES[space or method.space].check_rank(rank)


def check_fit(
    model: nn.Module, adapters: Sequence[Adapter], names: Sequence[str], check: bool
) -> None:
    """Refuse adapters that do not belong to the base.

    Raises:
        DoRAError: Naming all problems of the first such adapter.
    """
    for i, (adapter, name) in enumerate(zip(adapters, names, strict=True), 1):
        name = name or f"adapter {i}"
        if adapter.fine_tune_type == "full":
            raise DoRAError(
                f"{name} holds fully fine-tuned weights: merge them as models, or "
                "extract an adapter first."
            )
        if problems := all_problems(model, adapter, check):
            raise DoRAError(f"{name} does not fit the model: {'; '.join(problems)}.")
