"""Compares an adapter with its base, using only the factored terms."""

from collections.abc import Sequence
from pathlib import Path

import mlx.nn as nn

from mlx_dora import openblas
from mlx_dora.adapters.adapter import Adapter
from mlx_dora.adapters.attach import all_problems
from mlx_dora.adapters.files import read_adapter
from mlx_dora.adapters.hosting import load_lazily
from mlx_dora.adapters.keys import natural_order
from mlx_dora.adapters.matrices import adapted_matrices, named_matrices
from mlx_dora.analyze.metrics import MatrixAnalysis, measure
from mlx_dora.analyze.result import AdapterAnalysis
from mlx_dora.errors import DoRAError
from mlx_dora.layers import weight_of
from mlx_dora.matrix import row_geometry
from mlx_dora.progress import Progress


@openblas.one_thread()
def analyze_adapter(
    adapter: Adapter | str | Path,
    model: nn.Module | str | Path | None = None,
    *,
    check_base: bool = True,
    progress: Progress | None = None,
) -> AdapterAnalysis:
    """Analyze how a DoRA or LoRA adapter changes the rows of its base.

    Each base weight is read once, in blocks of rows. No weight is dequantized as a
    whole, and no adapted weight is built. Each expert counts as a separate matrix,
    named like ``path[3]``.

    Args:
        adapter: An adapter, or its folder.
        model: The base: a module, a folder or a Hub id; None for the base that the
            adapter records. A base loaded here is read one matrix at a time.
        check_base: Refuse an adapter that was trained on another base.
        progress: Called after each matrix.

    Raises:
        DoRAError: If the adapter or the base is missing, they do not fit together, or
            one holds NaN.
    """
    loaded, name = named_adapter(adapter, "the adapter")
    base, is_ours = load_base(model, [loaded])
    check_fit(base, [loaded], [name], check_base)
    modules = dict(base.named_modules())
    paths = sorted(loaded.paths, key=natural_order)
    layers: list[MatrixAnalysis] = []
    for path in paths:
        layers += _analyze_path(loaded, path, modules[path])
        if is_ours:  # so that one matrix is in memory, not the model
            modules[path].clear()
        if progress is not None:
            progress("analyze", len(paths), 1)
    known = loaded.base.model if model is None or is_ours else None
    return AdapterAnalysis(
        layers=layers,
        source=name,
        base=str(model) if isinstance(model, str | Path) else known or "a model",
    )


def named_adapter(adapter: Adapter | str | Path, name: str) -> tuple[Adapter, str]:
    """Return an adapter, read from its folder if necessary, and its name in errors."""
    if isinstance(adapter, Adapter):
        return adapter, name
    return read_adapter(adapter), str(adapter)


def load_base(
    model: nn.Module | str | Path | None, adapters: Sequence[Adapter]
) -> tuple[nn.Module, bool]:
    """Return the base, and whether it was loaded here, so that it may be emptied.

    Raises:
        DoRAError: If no base is given and no adapter names one.
    """
    if isinstance(model, nn.Module):
        return model, False
    source = model or next(
        (adapter.base.model for adapter in adapters if adapter.base.model), None
    )
    if source is None:
        raise DoRAError("the adapter does not record its base; give the model.")
    return load_lazily(source), True


def check_fit(
    model: nn.Module,
    adapters: Sequence[Adapter],
    names: Sequence[str],
    check_base: bool,
) -> None:
    """Raise an error that lists all reasons why adapters do not fit this base."""
    for adapter, name in zip(adapters, names, strict=True):
        if adapter.fine_tune_type == "full":
            raise DoRAError(
                f"{name} holds fully fine-tuned weights: analyze the two models."
            )
        if problems := all_problems(model, adapter, check_base):
            raise DoRAError(f"{name} does not fit the model: {'; '.join(problems)}.")


def _analyze_path(
    adapter: Adapter, path: str, module: nn.Module
) -> list[MatrixAnalysis]:
    adapted = adapted_matrices(adapter, path, module)
    analyses = []
    named = named_matrices(path, weight_of(module))
    for (name, weight), matrix in zip(named, adapted, strict=True):
        geometry = row_geometry(weight, matrix)
        if not geometry.is_finite:
            raise DoRAError(f"{name} of the base holds NaN or inf.")
        values = matrix.update.float64().singular_values()
        analyses.append(measure(name, geometry, values, rank=values.size))
    return analyses
