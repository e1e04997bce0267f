"""``mlx_dora.evaluate``: compares base, adapter and fused model."""

import textwrap
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import click

from mlx_dora.cli._base_model import announced_base
from mlx_dora.cli._config_file import config_file_option
from mlx_dora.cli._echo import echo, note
from mlx_dora.cli._framework import verb
from mlx_dora.cli._help import GroupedOption
from mlx_dora.cli._json import JsonOutput, json_option, overwrite_option
from mlx_dora.cli._options import dataclass_options
from mlx_dora.cli._paths import FILE, PATH, PATH_OR_ID
from mlx_dora.cli._progress import WorkDisplay
from mlx_dora.cli._publish import command_line
from mlx_dora.cli._tasks_text import describe_tasks
from mlx_dora.evaluate.config import EvaluateConfig

_DATA = next(field for field in fields(EvaluateConfig) if field.name == "data")
LABEL_WIDTH, TEXT_WIDTH = 11, 69
"""Columns of a sample's label and text, together those of a terminal."""


@verb(
    "evaluate",
    examples=(
        "mlx_dora.evaluate --adapter-path adapters --data FOLDER --mask-prompt",
        "mlx_dora.evaluate --adapter-path A --adapter-path B --data D1 --data D2",
    ),
)
@config_file_option
@dataclass_options(config=EvaluateConfig, exclude=("adapter_path", "data"))
@click.option(
    "--adapter-path",
    "adapters",
    type=PATH,
    multiple=True,
    cls=GroupedOption,
    group="Common options",
    help="Adapter to compare with the base. Repeat it for a table of adapters.",
)
@click.option(
    "--data",
    type=PATH_OR_ID,
    multiple=True,
    cls=GroupedOption,
    group="Common options",
    help=f"{_DATA.metadata['help']} Repeat it for a table of tasks.",
)
@click.option(
    "--report",
    type=FILE,
    help="Write a self-contained HTML page with the table and the samples.",
)
@json_option()
@overwrite_option("Replace an existing JSON file or report.")
def command(
    config: EvaluateConfig,
    adapters: tuple[str, ...],
    data: tuple[str, ...],
    report: Path | None,
    json_output: JsonOutput,
    overwrite: bool,
) -> None:
    """Compare a model with its adapter, and with the fused model, on data.

    Shows loss and perplexity, accuracy if the answers are labels, a few continuations
    side by side, and how much the fused model's logits differ from the adapter's. With
    several adapters or several data sets, or with --report: a table of the base and
    each adapter on each task.
    """
    if config.model is None and not adapters:
        raise click.UsageError(
            "give --model, or --adapter-path with an adapter that records its base"
        )
    is_table = len(adapters) > 1 or len(data) > 1 or report is not None
    if is_table and config.fused_path is not None:
        raise click.UsageError(
            "--fused-path is compared with one adapter on one data set: leave out "
            "--report and further --adapter-path and --data"
        )
    if len(data) > 1 and config.hf_dataset is not None:
        raise click.UsageError("hf_dataset replaces --data: give one or the other")
    config = replace(config, adapter_path=adapters[0] if adapters else None)
    config = replace(config, data=data[0]) if data else config
    every = data or (config.data,)
    note(f"Evaluating on {', '.join(every)} ...")
    inputs = (config.model, *adapters, config.fused_path, *every)
    from mlx_dora.io.output import check_output_file

    json_output.check(*inputs)
    if report is not None:
        outputs = (*inputs, json_output.file)
        check_output_file(report, inputs=outputs, overwrite=overwrite)
    if config.model is None:
        config = replace(config, model=announced_base(str(config.adapter_path)))
    if is_table:
        _show_table(config, adapters, every, report, json_output)
        return
    from mlx_dora.evaluate.comparison import compare_models

    with WorkDisplay() as display:
        comparison = compare_models(config, display.progress)
    for line in describe(comparison):
        echo(line)
    json_output.write(comparison.to_dict())


def _show_table(
    config: EvaluateConfig,
    adapters: Sequence[str],
    data: Sequence[str],
    report: Path | None,
    json_output: JsonOutput,
) -> None:
    """Measure every adapter on every task, and print and write the table."""
    from mlx_dora.evaluate.tasks import evaluate_tasks
    from mlx_dora.evaluate.tasks_page import render_tasks
    from mlx_dora.io.atomic import write_text

    with WorkDisplay() as display:
        table = evaluate_tasks(
            config, adapters=adapters, data=data, progress=display.progress
        )
    for line in describe_tasks(table, _quoted):
        echo(line)
    json_output.write(table.to_dict())
    if report is not None:
        write_text(report, render_tasks(table, command_line()))
        echo(f"Saved {report}")


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
