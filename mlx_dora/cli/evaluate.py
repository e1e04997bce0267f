"""``mlx_dora.evaluate``: base against adapter against fused model."""

import json
import textwrap
from typing import Any

import click

from mlx_dora.cli._config_file import config_file_option
from mlx_dora.cli._echo import echo
from mlx_dora.cli._framework import verb
from mlx_dora.cli._options import dataclass_options
from mlx_dora.cli._paths import PATH
from mlx_dora.cli._progress import WorkDisplay
from mlx_dora.evaluate.config import EvaluateConfig


@verb("evaluate")
@config_file_option
@dataclass_options(config=EvaluateConfig)
@click.option(
    "--json",
    "json_file",
    type=PATH,
    help="Write all results to this file too; - prints them alone.",
)
def command(config: EvaluateConfig, json_file: str | None) -> None:
    """Compare a model with its adapter, and with the fused model, on data.

    Shows loss and perplexity, accuracy where the answers are labels, a few
    continuations side by side, and how far the fused model's logits are from the
    adapter's.
    """
    from mlx_dora.evaluate.comparison import compare_models
    from mlx_dora.io.atomic import write_text
    from mlx_dora.io.output import check_output_file

    if config.model is None and config.adapter_path is None:
        raise click.UsageError(
            "give --model, or --adapter-path with an adapter that records its base"
        )
    if json_file is not None and json_file != "-":
        inputs = (config.model, config.adapter_path, config.fused_path, config.data)
        check_output_file(json_file, inputs=inputs, overwrite=True)
    with WorkDisplay() as display:
        comparison = compare_models(config, display.progress)
    if json_file is not None:
        text = json.dumps(comparison.to_dict(), indent=2) + "\n"
        if json_file == "-":
            click.echo(text, nl=False)
            return
        write_text(json_file, text)
    for line in describe(comparison):
        echo(line)


def describe(comparison: Any) -> list[str]:
    """The comparison as lines of text."""
    results = comparison.results
    first = results[0].loss
    lines = [
        f"{comparison.split} data: {first.rows} rows, {first.tokens:,} target tokens"
    ]
    for count, what in (
        (first.rows_truncated, "cut to max_seq_length"),
        (first.rows_skipped, "left out, without a target token"),
    ):
        if count:
            lines.append(f"  {count} rows {what}")
    with_labels = any(one.labels for one in results)
    lines.append(
        f"{'':<8} {'loss':>8} {'perplexity':>11}"
        + (f" {'accuracy':>9}" if with_labels else "")
    )
    for one in results:
        line = f"{one.name:<8} {one.loss.loss:>8.4f} {one.loss.perplexity:>11.3f}"
        if one.labels is not None:
            line += f" {one.labels.accuracy:>8.1%}"
        lines.append(line)
    if with_labels:
        lines.append(_describe_labels(results[0].labels))
    if comparison.agreement is not None:
        found = comparison.agreement
        lines.append(
            f"fused against adapter: logits differ by at most "
            f"{found.max_logit_difference:.2g} (relative "
            f"{found.relative_logit_difference:.2g}), loss by "
            f"{found.loss_difference:+.2g}, same top token at "
            f"{found.same_top_token:.1%} of {found.tokens} tokens"
        )
    for index, prompt in enumerate(comparison.prompts):
        lines += ["", f"sample {index + 1}", *_quoted("prompt", prompt.text)]
        lines += _quoted("data", prompt.expected)
        for one in results:
            lines += _quoted(one.name, one.samples[index])
    return lines


def _describe_labels(found: Any) -> str:
    names = ", ".join(f"{name.strip()!r} {n}" for name, n in found.labels.items())
    skipped = f"; {found.rows_skipped} rows too long" if found.rows_skipped else ""
    return f"accuracy: likeliest label on {found.rows} rows ({names}){skipped}"


def _quoted(name: str, text: str) -> list[str]:
    """Label and text; the text's lines stay lines, long ones are wrapped."""
    wrapped: list[str] = []
    for line in text.strip().splitlines() or [""]:
        wrapped += textwrap.wrap(line, 78) or [""]
    return [f"  {name + ':':<8} {wrapped[0]}", *(f"{'':<11}{w}" for w in wrapped[1:])]
