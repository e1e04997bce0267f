"""Measures how much rank cuts change the logits of a merged adapter."""

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from mlx_dora.adapters.adapter import LEAVES, Adapter
from mlx_dora.adapters.attach import attach_adapter
from mlx_dora.adapters.hosting import load
from mlx_dora.adapters.surgery import adapter_layers, remove_dora
from mlx_dora.data.batches import Examples
from mlx_dora.data.config import DataConfig
from mlx_dora.data.loading import make_datasets
from mlx_dora.data.splits import read_splits
from mlx_dora.errors import DoRAError
from mlx_dora.evaluate.agreement import compare_probe, take_probe
from mlx_dora.merge.adapters.report import AdapterMerge
from mlx_dora.progress import Progress

# Rows to compare the logits on, spread over the data, and their maximum length.
_ROWS, _TOKENS = 4, 128


def add_logit_errors(
    cut: AdapterMerge,
    full: Adapter,
    model: nn.Module,
    data: Examples,
    progress: Progress | None = None,
) -> AdapterMerge:
    """Measure the effect of each layer's rank cut, and of all cuts together.

    `full` is the same merge without cuts. For the effect of a single layer, all other
    layers stay uncut. The base model is unchanged on return.

    Returns:
        The report with relative errors: the root mean square of the difference in
        logits, divided by that of the uncut adapter's logits.
    """
    attach_adapter(model, full, check_base=False)
    try:
        probe = take_probe(model, data, rows=_ROWS, max_seq_length=_TOKENS)
        layers = dict(adapter_layers(model))

        def error() -> float:
            return compare_probe(model, probe).relative_logit_difference

        def put(path: str, adapter: Adapter) -> None:
            for leaf in LEAVES["dora"]:
                value = adapter.tensors[f"{path}.{leaf}"]
                layers[path][leaf] = value.astype(mx.float32)
            layers[path].invalidate()

        errors: dict[str, float] = {}
        for path in layers:  # all experts of a module at once
            put(path, cut.adapter)
            errors[path] = error()
            put(path, full)
            if progress is not None:
                progress("logits", len(layers), 1)
        for path in layers:
            put(path, cut.adapter)
        measured = tuple(
            replace(layer, logit_error=errors[layer.path]) for layer in cut.layers
        )
        return replace(cut, layers=measured, logit_error=error())
    finally:
        remove_dora(model)


def open_probe(model: str | Path, data: str) -> tuple[nn.Module, Examples]:
    """Load a base model and one split of a data set.

    The split is the first of test, valid and train that exists.

    Raises:
        DoRAError: If the model or the data cannot be loaded, or a row is malformed.
    """
    splits = read_splits(DataConfig(data=data))
    loaded, tokenizer = load(model)
    sets = make_datasets(splits, tokenizer)
    examples = sets["test"] or sets["valid"] or sets["train"]
    if examples is None:
        raise DoRAError(f"{data} has no rows: expected a test, valid or train split.")
    return loaded, examples
