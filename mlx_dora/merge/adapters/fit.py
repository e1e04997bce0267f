"""Checks that adapters, their base and the settings of a merge match."""

from collections.abc import Sequence
from pathlib import Path

import mlx.nn as nn

from mlx_dora.adapters.adapter import Adapter
from mlx_dora.adapters.attach import all_problems
from mlx_dora.errors import DoRAError
from mlx_dora.merge.adapters.dense import Options
from mlx_dora.merge.methods import method_named
from mlx_dora.merge.weights import Weights, check_weights


def check_arguments(
    adapters: Sequence[object],
    method: str,
    weights: Weights | None,
    rank: int | None,
    options: Options,
) -> None:
    """Refuse invalid settings of a merge.

    Raises:
        DoRAError: With the setting, the expected values and the given value.
    """
    entry = method_named(method)
    if not adapters:
        raise DoRAError("give at least one adapter to merge.")
    # Any mean accepts a single adapter, and returns it unchanged.
    entry.check_count(len(adapters), least=1 if entry.is_mean else None)
    entry.check_settings(options.given(), weights)
    if rank is not None and (type(rank) is not int or rank < 1):
        raise DoRAError(f"rank must be a whole number of at least 1, got {rank!r}.")
    check_weights(weights, len(adapters))


def check_fit(
    model: nn.Module,
    adapters: Sequence[Adapter],
    names: Sequence[str | Path],
    check_base: bool,
) -> None:
    """Refuse adapters that do not belong to the base.

    Raises:
        DoRAError: Naming the adapter and all of its problems.
    """
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
