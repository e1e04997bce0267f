r"""Estimating the Fisher information of matrices on data.

Per row x of the data, with its targets y drawn from the model at each place (or the
data's own), :math:`G = \partial \log p(y \mid x) / \partial W'`; the information is the
mean of :math:`G \circ G` over the rows (Matena and Raffel, arXiv:2111.09832).
Targets drawn place by place have independent gradients of mean 0, so that one backward
pass gives the sum over the places without bias.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.nn as nn

from mlx_dora.adapters.attach import attach_adapter
from mlx_dora.adapters.files import load_adapter
from mlx_dora.adapters.hosting import load
from mlx_dora.adapters.keys import blocks, natural_order, resolve_keys
from mlx_dora.adapters.surgery import adapter_layers, remove_dora
from mlx_dora.data.batches import Examples
from mlx_dora.data.dataset import Dataset, TokenDataset
from mlx_dora.data.loading import make_datasets
from mlx_dora.data.splits import read_splits
from mlx_dora.errors import DoRAError
from mlx_dora.io.atomic import check_output
from mlx_dora.merge.fisher.config import FisherConfig
from mlx_dora.merge.fisher.information import (
    Fisher,
    FisherFacts,
    save_fisher,
    squared,
    with_norm,
)
from mlx_dora.merge.fisher.squared_gradients import SquaredGradients
from mlx_dora.progress import Progress


def estimate_fisher(
    model: nn.Module,
    data: Examples,
    *,
    paths: Sequence[str] | None = None,
    config: FisherConfig | None = None,
    progress: Progress | None = None,
) -> Fisher:
    """Estimate the information of a model's linear layers, held in memory.

    Args:
        model: With or without an adapter; it is as it was afterwards.
        data: A data set, or a list of examples: tokens, and the first target's place.
        paths: Full paths of linear modules in the blocks; None for the adapted ones,
            or all if there is no adapter.
        config: How; its data is not looked at.
        progress: Called as the work goes on.

    Raises:
        DoRAError: If a path is not of a linear module in a block, or no row has a
            target.
    """
    config = config or FisherConfig()
    chosen = linear_paths(model, paths)
    gradients = SquaredGradients(model, data, chosen, config, progress)
    tensors = dict(gradients.matrices())
    square = sum(squared(tensor) for tensor in tensors.values())
    return Fisher(with_norm(_facts(gradients), square), tensors)


def write_fisher(
    model: str | Path,
    save_path: str | Path,
    *,
    adapter: str | Path | None = None,
    keys: Sequence[str] | None = None,
    config: FisherConfig,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> FisherFacts:
    """Estimate the information of a model, or of one with an adapter, into a folder.

    Args:
        model: Folder or Hub id.
        save_path: The folder to make.
        adapter: Its folder.
        keys: Modules, as in `DoRAConfig`; the adapted ones, or all linear layers of the
            blocks, if None.
        config: The data and how much of it.
        overwrite: Replace an existing folder.
        progress: Called as the work goes on.

    Returns:
        What was found, for a report.

    Raises:
        DoRAError: If the model, the adapter or the data cannot be used.
    """
    inputs = (model, adapter, config.data)
    check_output(save_path, inputs=inputs, overwrite=overwrite)
    loaded, tokenizer = load(model, adapter)
    chosen = None if keys is None else resolve_keys(loaded, keys, -1)
    data = read_targets(config, tokenizer)
    paths = linear_paths(loaded, chosen)
    gradients = SquaredGradients(loaded, data, paths, config, progress)
    facts = replace(
        _facts(gradients),
        model=str(model),
        adapter=None if adapter is None else str(adapter),
        data=config.data,
    )
    return save_fisher(
        save_path, facts, gradients.matrices(), inputs=inputs, overwrite=overwrite
    )


def estimate_on_data(
    model: str | Path,
    adapters: Sequence[str | Path],
    data: Sequence[str],
    check_base: bool = True,
    progress: Progress | None = None,
) -> list[Fisher]:
    """The information by row of each adapter on its own data, as `FisherConfig` has it.

    Of all modules in the blocks that any of them has: where an adapter leaves one as it
    is, the base's rows have information too.

    Args:
        model: Folder or Hub id of the base.
        adapters: Folders.
        data: One folder or name each.
        check_base: Refuse an adapter of another base.
        progress: Called as the work goes on.

    Raises:
        DoRAError: If an adapter does not fit, or its data cannot be used.
    """
    if len(data) != len(adapters):
        raise DoRAError(
            f"give one data set an adapter: expected {len(adapters)}, got {len(data)}."
        )
    opened = [load_adapter(path) for path in adapters]
    loaded, tokenizer = load(model)
    configs = [FisherConfig(data=name) for name in data]
    sets = [read_targets(config, tokenizer) for config in configs]
    inside = tuple(f"{path}." for path, _ in blocks(loaded))
    every = sorted(
        {path for adapter in opened for path in adapter.paths}, key=natural_order
    )
    paths = [path for path in every if path.startswith(inside)]
    estimates = []
    for name, adapter, rows, config in zip(
        adapters, opened, sets, configs, strict=True
    ):
        attach_adapter(loaded, adapter, check_base=check_base, name=str(name))
        estimates.append(
            estimate_fisher(loaded, rows, paths=paths, config=config, progress=progress)
        )
        remove_dora(loaded)
    return estimates


def read_targets(config: FisherConfig, tokenizer: Any) -> Dataset:
    """The rows of a data set; in completions and chats the answers alone are targets.

    Raises:
        DoRAError: If there is no such data, or a row is malformed.
    """
    plain = replace(config, mask_prompt=False, all_turns=False)
    parts = read_splits(plain, [config.split])
    if not parts.get(config.split):
        raise DoRAError(f"{config.data} has no {config.split} data.")
    rows = parts[config.split]
    if not config.whole and all(
        TokenDataset(part, tokenizer).kind in ("completions", "chat") for part in rows
    ):
        masked = replace(config, mask_prompt=True, all_turns=True)
        rows = [replace(part, config=masked) for part in rows]
    dataset = make_datasets({config.split: rows}, tokenizer)[config.split]
    assert dataset is not None
    return dataset


def linear_paths(model: nn.Module, paths: Sequence[str] | None) -> list[str]:
    """Check the paths of linear modules, or choose them; see `estimate_fisher`.

    Raises:
        DoRAError: Naming those that are not linear or not in a block.
    """
    inside = tuple(f"{path}." for path, _ in blocks(model))
    modules = dict(model.named_modules())
    if paths is None:
        adapted = [path for path, _ in adapter_layers(model)]
        chosen = adapted or resolve_keys(model, None, -1)
        paths = [p for p in chosen if p.startswith(inside) and _is_linear(modules[p])]
    wrong = [
        path
        for path in paths
        if path not in modules
        or not path.startswith(inside)
        or not _is_linear(modules[path])
    ]
    if wrong or not paths:
        raise DoRAError(
            "Fisher information is estimated of linear layers in the model's blocks; "
            f"not of {', '.join(wrong[:10]) or 'a model without any'}."
        )
    return list(paths)


def _is_linear(module: nn.Module) -> bool:
    base = module.get("linear", module)
    return isinstance(base, nn.Linear | nn.QuantizedLinear)


def _facts(gradients: SquaredGradients) -> FisherFacts:
    return FisherFacts(
        granularity=gradients.config.granularity,
        labels=gradients.config.labels,
        rows=gradients.rows,
        tokens=gradients.tokens,
        norm=0.0,
    )
