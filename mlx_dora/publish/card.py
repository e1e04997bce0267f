"""Writes model cards: the base, the training, and the change of the weights."""

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_dora.adapters.adapter import Adapter
from mlx_dora.adapters.files import load_adapter
from mlx_dora.analyze.adapter import analyze_adapter
from mlx_dora.analyze.result import AdapterAnalysis
from mlx_dora.analyze.table import describe
from mlx_dora.fuse.report import FuseReport
from mlx_dora.publish.markdown import block, inline, is_local, name_of, without_folders

_CHANGED = 5
"""Number of the most changed matrices that a card lists."""


def adapter_card(
    folder: str | Path, base: str, command: Sequence[str], data: str | None
) -> str:
    """Return the card of a trained adapter in Markdown.

    Args:
        folder: The adapter's folder.
        base: Name of the base model, as the user gave it.
        command: The words of the command that made the adapter. Of local paths, only
            the last name is shown.
        data: Name of the training data, as the user gave it.

    Raises:
        DoRAError: If the adapter or its base cannot be read.
    """
    adapter = load_adapter(folder)
    name = {"dora": "DoRA", "lora": "LoRA", "full": "fully fine-tuned weights"}
    kind = name[adapter.fine_tune_type]
    parts = [
        _front_matter(base, [adapter.fine_tune_type, "mlx_dora"]),
        f"# {inline(Path(folder).resolve().name)}: {kind} for {inline(_shown(base))}",
        *_training(adapter, command, data),
    ]
    if adapter.fine_tune_type != "full":
        parts += _changes(analyze_adapter(adapter, base))
    model = shlex.quote(_shown(base))
    use = f"mlx_lm.generate --model {model} --adapter-path FOLDER --prompt ..."
    return "\n\n".join([*parts, "## Use", block(use)]) + "\n"


def fused_card(
    folder: str | Path,
    adapter_path: str | Path,
    base: str,
    report: FuseReport,
    command: Sequence[str],
) -> str:
    """Return the card of a fused model in Markdown.

    Args:
        folder: The fused model's folder.
        adapter_path: The adapter's folder.
        base: Name of the adapter's base model, as the user gave it.
        report: The report of the fuse.
        command: The words of the command that fused the model.

    Raises:
        DoRAError: If the adapter or its base cannot be read.
    """
    adapter = load_adapter(adapter_path)
    total = report.total
    fused = (
        f"An adapter is fused into {len(report.layers)} layers: "
        f"{100 * total.kept:.1f} % of its update kept, cosine {total.cosine:.3f}, "
        f"{report.bytes_before:,} bytes before, {report.bytes_after:,} after."
    )
    parts = [
        _front_matter(base, [adapter.fine_tune_type, "mlx_dora"]),
        f"# {inline(Path(folder).resolve().name)}: {inline(_shown(base))} with a "
        f"{adapter.fine_tune_type} adapter fused in",
        fused,
        *_training(adapter, command, None),
    ]
    if adapter.fine_tune_type != "full":
        parts += _changes(analyze_adapter(adapter, base))
    use = "mlx_lm.generate --model FOLDER --prompt ..."
    return "\n\n".join([*parts, "## Use", block(use)]) + "\n"


def _front_matter(base: str, tags: Sequence[str]) -> str:
    """Return the card's metadata for the Hub; the base is listed only if a Hub id."""
    lines = ["---", "library_name: mlx", "pipeline_tag: text-generation"]
    if not _is_local(base):
        lines.append(f"base_model: {json.dumps(base)}")
    lines += ["tags:", "- mlx", *(f"- {tag}" for tag in tags), "---"]
    return "\n".join(lines)


def _is_local(base: str) -> bool:
    return is_local(base) or Path(base).expanduser().exists()


def _shown(base: str) -> str:
    return Path(base).expanduser().resolve().name if _is_local(base) else base


def _training(adapter: Adapter, command: Sequence[str], data: str | None) -> list[str]:
    settings: dict[str, Any] = dict(adapter.training or {})
    if adapter.fine_tune_type != "full":
        config = adapter.config
        settings = {
            "rank": config.rank,
            "scale": config.scale,
            "dropout": config.dropout,
            "modules": len(adapter.paths),
            **settings,
        }
    if data is not None:
        settings = {"data": name_of(data), **settings}
    parts = ["## How it was made", block(without_folders(list(command)))]
    if settings:
        rows = [
            f"| {inline(key)} | {_cell(value)} |" for key, value in settings.items()
        ]
        parts.append("\n".join(["| setting | value |", "| --- | --- |", *rows]))
    return parts


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return ", ".join(
            f"{inline(str(key))} {_cell(item)}" for key, item in value.items()
        )
    return inline(str(value))


def _changes(analysis: AdapterAnalysis) -> list[str]:
    """Describe ΔM and ΔD (DoRA, arXiv:2402.09353, section 3.2), mean and largest."""
    layers = analysis.layers
    count = len(layers)
    means = [
        sum(getattr(layer, field) for layer in layers) / count
        for field in ("delta_m", "delta_m_relative", "delta_d")
    ]
    text = (
        f"Mean over {count} matrices: ΔM {means[0]:.3g} ({means[1]:.2%} of the rows' "
        f"length), ΔD {means[2]:.3g}. {describe(analysis.association)}."
    )
    most = sorted(layers, key=lambda layer: layer.delta_d, reverse=True)[:_CHANGED]
    rows = [
        f"| {inline(layer.name)} | {layer.delta_m:.3g} | {layer.delta_d:.3g} | "
        f"{layer.classification} |"
        for layer in most
    ]
    head = ["| most turned | ΔM | ΔD | rows are mostly |", "| --- | --- | --- | --- |"]
    return ["## What it changed", text, "\n".join([*head, *rows])]
