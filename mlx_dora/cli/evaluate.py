"""``mlx_dora.evaluate``: compares base, adapter and fused model."""

import textwrap
from dataclasses import replace
from typing import Any

import click

from mlx_dora.cli._base_model import announced_base
from mlx_dora.cli._config_file import config_file_option
from mlx_dora.cli._echo import echo
from mlx_dora.cli._framework import verb
from mlx_dora.cli._json import JsonOutput, json_option
from mlx_dora.cli._options import dataclass_options
from mlx_dora.cli._progress import WorkDisplay
from mlx_dora.evaluate.config import EvaluateConfig

LABEL_WIDTH, TEXT_WIDTH = 11, 69
"""Columns of a sample's label and text, together those of a terminal."""


@verb(
    "evaluate",
    examples=(
        "mlx_dora.evaluate --adapter-path adapters --data FOLDER --mask-prompt",
        "mlx_dora.evaluate --model MODEL --data FOLDER --split valid --samples 0",
    ),
)
@config_file_option
@dataclass_options(config=EvaluateConfig)
@json_option(overwrite=True)
def command(config: EvaluateConfig, json_output: JsonOutput) -> None:
    """Compare a model with its adapter, and with the fused model, on data.

    Shows loss and perplexity, accuracy if the answers are labels, a few continuations
    side by side, and how much the fused model's logits differ from the adapter's.
    """
    from mlx_dora.evaluate.comparison import compare_models

    if config.model is None and config.adapter_path is None:
        raise click.UsageError(
            "give --model, or --adapter-path with an adapter that records its base"
        )
    json_output.check(config.model, config.adapter_path, config.fused_path, config.data)
    if config.model is None:
        config = replace(config, model=announced_base(str(config.adapter_path)))
    with WorkDisplay() as display:
        comparison = compare_models(config, display.progress)
    for line in describe(comparison):
        echo(line)
    json_output.write(comparison.to_dict())


def describe(comparison: Any) -> list[str]:
    """Format the comparison as lines of text."""
    results = comparison.results
    first = results[0].loss
    lines = [
        f"{comparison.split} data: {first.rows} rows, {first.tokens:,} target tokens"
    ]
    for count, what in (
        (first.rows_truncated, "cut to max_seq_length"),
        (first.rows_skipped, "skipped, without a target token"),
    ):
        if count:
            lines.append(f"  {count} rows {what}")
    with_labels = any(result.labels for result in results)
    lines.append(
        f"{'':<8} {'loss':>8} {'perplexity':>11}"
        + (f" {'accuracy':>9}" if with_labels else "")
    )
    for result in results:
        line = (
            f"{result.name:<8} {result.loss.loss:>8.4f} {result.loss.perplexity:>11.3f}"
        )
        if result.labels is not None:
            line += f" {result.labels.accuracy:>8.1%}"
        lines.append(line)
    if with_labels:
        lines.append(_describe_labels(results[0].labels))
    if comparison.agreement is not None:
        agreement = comparison.agreement
        lines.append(
            f"fused against adapter: logits differ by at most "
            f"{agreement.max_logit_difference:.2g} (relative "
            f"{agreement.relative_logit_difference:.2g}), loss by "
            f"{agreement.loss_difference:+.2g}, same top token at "
            f"{agreement.same_top_token:.1%} of {agreement.tokens} tokens"
        )
    for index, prompt in enumerate(comparison.prompts):
        lines += ["", f"sample {index + 1}", *_quoted("prompt", prompt.text)]
        lines += _quoted("data", prompt.expected)
        for result in results:
            lines += _quoted(result.name, result.samples[index])
    return lines


def _describe_labels(score: Any) -> str:
    names = ", ".join(f"{name.strip()!r} {n}" for name, n in score.labels.items())
    skipped = f"; {score.rows_skipped} rows too long" if score.rows_skipped else ""
    return f"accuracy: most likely label on {score.rows} rows ({names}){skipped}"


def _quoted(name: str, text: str) -> list[str]:
    """Format a label and its text; keep line breaks and wrap long lines."""
    wrapped: list[str] = []
    for line in text.strip().splitlines() or [""]:
        wrapped += textwrap.wrap(line, TEXT_WIDTH) or [""]
    return [
        f"  {name + ':':<8} {wrapped[0]}",
        *(f"{'':{LABEL_WIDTH}}{w}" for w in wrapped[1:]),
    ]
