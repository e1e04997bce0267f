"""A merge of adapter folders with all that it needs: estimates, probes, the base."""

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
        adapters: The folders.
        save_path: The folder to make.
        model: The base; None for the base that the first adapter names.
        method: A method's name.
        weights: As of `merge_adapters`.
        rank: Cut the updates to this rank.
        overwrite: Replace an existing folder.
        check_base: Refuse adapters of another base.
        options: Settings of the method.
        fisher: Folders of Fisher information, one an adapter.
        data: Data of each adapter, to estimate the information on.
        logit_error: Data on which to measure how much the cut changes the logits.
        progress: Called as the work goes on.

    Raises:
        DoRAError: As `merge_adapters`, and if data are given that have no use.
    """
    _check_data(method, rank, fisher, data, logit_error)
    base = model or recorded_base(adapters[0])
    inputs = (*adapters, base, logit_error, *fisher, *data)
    # Before what takes long.
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
        raise DoRAError(f"{method} has no use for the adapters' data here.")
    if logit_error is not None and rank is None:
        raise DoRAError("logits are compared where a rank cuts the updates: give one.")
