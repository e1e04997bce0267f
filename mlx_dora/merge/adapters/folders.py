"""Merges adapter folders; loads the base, Fisher information and probe data."""

from collections.abc import Sequence

from mlx_dora.adapters.recorded_base import recorded_base
from mlx_dora.errors import DoRAError
from mlx_dora.io.atomic import check_output
from mlx_dora.merge.adapters.cut_error import open_probe
from mlx_dora.merge.adapters.dense import Options
from mlx_dora.merge.adapters.merge import merge_adapters_report
from mlx_dora.merge.adapters.report import AdapterMerge
from mlx_dora.merge.fisher.estimate import estimate_on_data
from mlx_dora.merge.methods import DEFAULT, method_named
from mlx_dora.merge.weights import Weights
from mlx_dora.progress import Progress


def merge_folders(
    adapters: Sequence[str],
    save_path: str,
    *,
    model: str | None = None,
    method: str = DEFAULT,
    weights: Weights | None = None,
    rank: int | None = None,
    overwrite: bool = False,
    check_base: bool = True,
    options: Options | None = None,
    fisher: Sequence[str] = (),
    data: Sequence[str] = (),
    logit_error: str | None = None,
    progress: Progress | None = None,
) -> AdapterMerge:
    """Merge adapter folders into one; see `mlx_dora.merge.merge_adapters`.

    Args:
        adapters: Adapter folders.
        save_path: Output folder.
        model: The base model; None for the base recorded in the first adapter.
        method: Name of the method.
        weights: As in `merge_adapters`.
        rank: Maximum rank of the updates.
        overwrite: Replace an existing folder.
        check_base: Refuse adapters trained on another base.
        options: Settings of the method.
        fisher: Folders of Fisher information, one per adapter.
        data: Data of each adapter, to estimate its Fisher information on.
        logit_error: Data on which to measure how much the rank cut changes the logits.
        progress: Progress callback.

    Raises:
        DoRAError: As `merge_adapters`, or if data would not be used.
    """
    _check_data(method, rank, fisher, data, logit_error)
    base = model or recorded_base(adapters[0])
    inputs = (*adapters, base, logit_error, *fisher, *data)
    # Before the slow part.
    check_output(save_path, inputs=inputs, overwrite=overwrite)
    loaded, probe = open_probe(base, logit_error) if logit_error else (base, None)
    known = fisher or None
    if data:
        known = estimate_on_data(base, adapters, data, check_base, progress)
    return merge_adapters_report(
        adapters,
        model=loaded,
        method=method,
        weights=weights,
        rank=rank,
        save_path=save_path,
        overwrite=overwrite,
        check_base=check_base,
        options=options,
        fisher=known,
        probe=probe,
        inputs=inputs,
        progress=progress,
    )


def _check_data(
    method: str,
    rank: int | None,
    fisher: Sequence[str],
    data: Sequence[str],
    logit_error: str | None,
) -> None:
    if data and (fisher or not method_named(method).needs_fisher):
        raise DoRAError(
            f"{method} does not use the adapters' data: give data only with method "
            "fisher, without fisher folders."
        )
    if logit_error is not None and rank is None:
        raise DoRAError("logit_error measures a rank cut: give a rank.")
