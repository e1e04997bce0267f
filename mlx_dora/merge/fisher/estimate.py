r"""Estimates the Fisher information of matrices on data.

For each row x of the data, targets y are drawn from the model at each position (or
taken from the data) and :math:`G = \partial \log p(y \mid x) / \partial W'`. The
information is the mean of :math:`G \circ G` over the rows (Matena and Raffel,
arXiv:2111.09832). Targets drawn position by position have independent gradients of mean
0, so one backward pass gives an unbiased sum over the positions.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.nn as nn

from mlx_dora.adapters.adapter import Adapter
from mlx_dora.adapters.attach import attach_adapter
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
    """Estimate the Fisher information of a model's linear layers in memory.

    Args:
        model: A model with or without an adapter; unchanged on return.
        data: A data set, or a list of examples: tokens, and the index of the first
            target.
        paths: Full paths of linear modules in the blocks; None for the adapted
            modules, or for all if there is no adapter.
        config: Settings; its data set is ignored.
        progress: Progress callback.

    Raises:
        DoRAError: If a path does not name a linear module in a block, or no row has a
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
    """Estimate the Fisher information of a model and write it to a folder.

    The model may have an adapter. `keys` are those of `DoRAConfig`; None covers the
    adapted modules, or all linear layers of the blocks if there is no adapter.

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
    adapters: Sequence[Adapter],
    names: Sequence[str],
    data: Sequence[str],
    check_base: bool = True,
    progress: Progress | None = None,
) -> list[Fisher]:
    """Estimate the information by row of each adapter on its own data.

    Uses the defaults of `FisherConfig`, and covers all modules in the blocks that any
    adapter has: where an adapter lacks a module, the base's rows have information too.
    Error messages call the adapters by `names`.

    Raises:
        DoRAError: If an adapter does not fit, or its data cannot be used.
    """
    if len(data) != len(adapters):
        raise DoRAError(
            f"give one data set per adapter: expected {len(adapters)}, got {len(data)}."
        )
    loaded, tokenizer = load(model)
    configs = [FisherConfig(data=name) for name in data]
    sets = [read_targets(config, tokenizer) for config in configs]
    inside = tuple(f"{path}." for path, _ in blocks(loaded))
    every = sorted(
        {path for adapter in adapters for path in adapter.paths}, key=natural_order
    )
    paths = [path for path in every if path.startswith(inside)]
    estimates = []
    for name, adapter, rows, config in zip(names, adapters, sets, configs, strict=True):
        attach_adapter(loaded, adapter, check_base=check_base, name=name)
        estimates.append(
            estimate_fisher(loaded, rows, paths=paths, config=config, progress=progress)
        )
        remove_dora(loaded)
    return estimates


def read_targets(config: FisherConfig, tokenizer: Any) -> Dataset:
    """Read the rows of a data set; in completions and chats only answers are targets.

    Raises:
        DoRAError: If the data cannot be read, or a row is malformed.
    """
    plain = replace(config, mask_prompt=False, all_turns=False)
    parts = read_splits(plain, [config.split])
    if not parts.get(config.split):
        raise DoRAError(f"{config.data} has no {config.split} data.")
    rows = parts[config.split]
    if not config.whole and all(
        TokenDataset(part, tokenizer).has_answers for part in rows
    ):
        masked = replace(config, mask_prompt=True, all_turns=True)
        rows = [replace(part, config=masked) for part in rows]
    dataset = make_datasets({config.split: rows}, tokenizer)[config.split]
    assert dataset is not None
    return dataset


def linear_paths(model: nn.Module, paths: Sequence[str] | None) -> list[str]:
    """Check the paths of linear modules, or choose them as `estimate_fisher` says.

    Raises:
        DoRAError: Naming the modules that are not linear or not in a block.
    """
    inside = tuple(f"{path}." for path, _ in blocks(model))
    modules = dict(model.named_modules())
    linear = {p for p in modules if p.startswith(inside) and _is_linear(modules[p])}
    if paths is None:
        adapted = [path for path, _ in adapter_layers(model)]
        chosen = adapted or resolve_keys(model, None, -1)
        paths = [path for path in chosen if path in linear]
    wrong = [path for path in paths if path not in linear]
    if wrong or not paths:
        raise DoRAError(
            "Fisher information is estimated only for linear layers in the model's "
            f"blocks, not of {', '.join(wrong[:10]) or 'a model without any'}."
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
