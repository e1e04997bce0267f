"""Writes model cards: the base, the training, the results and the changed weights."""

import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from mlx_dora.adapters.adapter import Adapter
from mlx_dora.adapters.files import load_adapter
from mlx_dora.analyze.adapter import analyze_adapter
from mlx_dora.analyze.table import describe
from mlx_dora.fuse.report import FuseReport
from mlx_dora.io.hub_id import hub_id
from mlx_dora.publish.markdown import block, inline, table, without_folders
from mlx_dora.publish.metadata import card_data, recorded_datasets
from mlx_dora.publish.names import name_of

_CHANGED = 5
"""Number of the most changed matrices that a card lists."""

_NO_REPO = "USER/NAME"
"""Stands for the repository in commands if the card is not uploaded."""

_KINDS = {"dora": "DoRA adapter", "lora": "LoRA adapter", "full": "full fine-tuning"}

_LOSS_LEGEND = (
    "Loss: mean cross-entropy per target token, in nats, as last reported in training. "
    "Perplexity: e to the power of the loss. Lower is better."
)
_CHANGE_LEGEND = (
    "ΔM: mean change of the length of a matrix's rows. ΔD: mean of 1 − cosine between "
    "a row before and after. Correlation of ΔM and ΔD over n matrices: Pearson's with "
    "its 95 % interval, and Spearman's. (DoRA, arXiv:2402.09353, section 3.2.)"
)


def adapter_card(
    folder: str | Path,
    base: str,
    command: Sequence[str],
    data: Sequence[str],
    repo: str | None = None,
) -> str:
    """Return the card of a trained adapter in Markdown.

    Args:
        folder: The adapter's folder.
        base: Name of the base model, as the user gave it.
        command: The words of the command that made the adapter. Of local paths, only
            the last name is shown.
        data: Names of the training data, as the user gave them.
        repo: Hub id to which the adapter will be uploaded, if known.

    Raises:
        DoRAError: If the adapter or its base cannot be read.
    """
    adapter, shown = load_adapter(folder), _shown(base)
    use = (
        f"hf download {shlex.quote(repo or _NO_REPO)} --local-dir adapter\n"
        f"mlx_lm.generate --model {shlex.quote(shown)} --adapter-path adapter "
        "--prompt ..."
    )
    lead = [f"# {inline(shown)}: {_KINDS[adapter.fine_tune_type]}"]
    relation = "finetune" if adapter.fine_tune_type == "full" else "adapter"
    return _card(adapter, base, relation, lead, command, data, use)


def fused_card(
    adapter_path: str | Path,
    base: str,
    report: FuseReport,
    command: Sequence[str],
    repo: str | None = None,
) -> str:
    """Return the card of a fused model in Markdown.

    Args:
        adapter_path: The adapter's folder; data sets come from its card, if any.
        base: Name of the adapter's base model, as the user gave it.
        report: The report of the fuse.
        command: The words of the command that fused the model.
        repo: Hub id to which the model will be uploaded, if known.

    Raises:
        DoRAError: If the adapter or its base cannot be read.
    """
    adapter, total = load_adapter(adapter_path), report.total
    lead = [
        f"# {inline(_shown(base))} with a {_KINDS[adapter.fine_tune_type]} fused in",
        f"An adapter is fused into {len(report.layers)} layers: "
        f"{100 * total.kept:.1f} % of its update kept, cosine {total.cosine:.3f}, "
        f"{report.bytes_before:,} bytes before, {report.bytes_after:,} after.",
    ]
    use = f"mlx_lm.generate --model {shlex.quote(repo or _NO_REPO)} --prompt ..."
    data = recorded_datasets(adapter_path)
    return _card(adapter, base, "finetune", lead, command, data, use)


def _card(
    adapter: Adapter,
    base: str,
    relation: str,
    lead: Sequence[str],
    command: Sequence[str],
    data: Sequence[str],
    use: str,
) -> str:
    perplexity = _perplexity(adapter)
    head = card_data(base, adapter.fine_tune_type, relation, data, perplexity)
    parts = [
        *lead,
        *_training(adapter, command, data),
        *_results(adapter, perplexity),
        *_changes(adapter, base),
        "## Use",
        block(use),
    ]
    body = "\n\n".join(parts)
    return str(ModelCard(f"---\n{head.to_yaml()}\n---\n\n{body}\n"))


def _shown(base: str) -> str:
    """Return the name of the base for the card: its Hub id, or its folder's name."""
    return hub_id(base) or Path(base).expanduser().resolve().name


def _training(
    adapter: Adapter, command: Sequence[str], data: Sequence[str]
) -> list[str]:
    settings: dict[str, Any] = {}
    if data:
        settings["data"] = [name_of(name) for name in data]
    if adapter.fine_tune_type != "full":
        names = ("rank", "scale", "dropout")
        settings |= {name: getattr(adapter.config, name) for name in names}
        settings["modules"] = len(adapter.paths)
    recorded = adapter.training or {}
    losses = ("train_loss", "val_loss")
    settings |= {
        name: value
        for name, value in recorded.items()
        if name not in losses and value is not None
    }
    parts = ["## How it was made", block(without_folders(command))]
    if settings:
        parts.append(table(["setting", "value"], list(settings.items())))
    return parts


def _loss(adapter: Adapter, name: str) -> float | None:
    """Return a loss that the adapter records; None if there is no usable number."""
    loss = (adapter.training or {}).get(name)
    return loss if isinstance(loss, float) and math.isfinite(loss) else None


def _perplexity(adapter: Adapter) -> float | None:
    loss = _loss(adapter, "val_loss")
    return math.exp(loss) if loss is not None and loss < 100 else None


def _results(adapter: Adapter, perplexity: float | None) -> list[str]:
    results = {
        "training loss": _loss(adapter, "train_loss"),
        "validation loss": _loss(adapter, "val_loss"),
        "validation perplexity": perplexity,
    }
    rows = [(name, value) for name, value in results.items() if value is not None]
    if not rows:
        return []
    return ["## Results", table(["measure", "value"], rows), _LOSS_LEGEND]


def _changes(adapter: Adapter, base: str) -> list[str]:
    """Describe how far the rows grew and turned; nothing for full fine-tuning."""
    if adapter.fine_tune_type == "full":
        return []
    analysis = analyze_adapter(adapter, base)
    layers = analysis.layers
    means = [
        sum(getattr(layer, field) for layer in layers) / len(layers)
        for field in ("delta_m", "delta_m_relative", "delta_d")
    ]
    text = (
        f"Mean over {len(layers)} matrices: ΔM {means[0]:.3g} ({means[1]:.2%} of the "
        f"rows' length), ΔD {means[2]:.3g}. {describe(analysis.association)}."
    )
    most = sorted(layers, key=lambda layer: layer.delta_d, reverse=True)[:_CHANGED]
    rows = [
        (x.name, f"{x.delta_m:.3g}", f"{x.delta_d:.3g}", x.classification) for x in most
    ]
    heads = ["most turned", "ΔM", "ΔD", "rows are mostly"]
    return ["## What it changed", text, table(heads, rows), _CHANGE_LEGEND]
