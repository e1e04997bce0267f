"""``mlx_dora.analyze``: shows how fine-tuning changed magnitude and direction."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_dora.cli._base_model import check_base_option
from mlx_dora.cli._echo import echo
from mlx_dora.cli._framework import verb_group
from mlx_dora.cli._json import JsonOutput, json_option, overwrite_option
from mlx_dora.cli._paths import FILE, PATH, PATH_OR_ID
from mlx_dora.cli._progress import WorkDisplay
from mlx_dora.cli._publish import command_line

if TYPE_CHECKING:
    from mlx_dora.analyze.compare import AdapterComparison
    from mlx_dora.analyze.result import AdaptationAnalysis

_MODEL = click.option(
    "--model",
    type=PATH_OR_ID,
    help="The base model; by default, the base that the adapter records.",
)
_BY = click.option(
    "--by",
    type=click.Choice(["matrix", "layer", "module", "expert"]),
    default="matrix",
    help="What each line of the table shows. Except for 'expert', all experts of a "
    "matrix share one line.",
)


def _output_options(function: Callable[..., None]) -> Callable[..., None]:
    for option in (
        overwrite_option("Replace an existing JSON file or report."),
        click.option(
            "--report",
            type=FILE,
            help="Write a self-contained HTML report, which needs no network.",
        ),
        json_option(),
        click.option(
            "--top",
            type=click.IntRange(min=1),
            default=20,
            help="Greatest number of lines of the table.",
        ),
    ):
        function = option(function)
    return function


@verb_group(
    "analyze",
    examples=(
        "mlx_dora.analyze adapter adapters --report report.html",
        "mlx_dora.analyze compare A1 A2 --json -",
    ),
)
def command() -> None:
    """Show how fine-tuning changed magnitude and direction."""


@command.command(
    "adapter",
    examples=(
        "mlx_dora.analyze adapter adapters --by layer",
        "mlx_dora.analyze adapter adapters --report report.html --json all.json",
    ),
)
@click.argument("adapter", type=PATH)
@_MODEL
@_BY
@check_base_option
@_output_options
def adapter_command(
    adapter: str,
    model: str | None,
    by: str,
    check_base: bool,
    top: int | None,
    json_output: JsonOutput,
    report: Path | None,
    overwrite: bool,
) -> None:
    """Analyze a DoRA or LoRA adapter against its base, without a dense weight."""
    from mlx_dora.analyze.adapter import analyze_adapter
    from mlx_dora.analyze.table import analysis_lines

    _check_outputs(json_output, report, overwrite, adapter, model)
    with WorkDisplay() as display:
        analysis = analyze_adapter(
            adapter, model, check_base=check_base, progress=display.progress
        )
    _print(analysis_lines(analysis, by=by, top=top))
    _write(analysis, json_output, report, Path(adapter) / "log.jsonl")


@command.command(
    "compare",
    examples=(
        "mlx_dora.analyze compare A1 A2",
        "mlx_dora.analyze compare A1 A2 A3 --report report.html",
    ),
)
@click.argument("adapters", type=PATH, nargs=-1, required=True, metavar="A B ...")
@_MODEL
@check_base_option
@_output_options
def compare_command(
    adapters: tuple[str, ...],
    model: str | None,
    check_base: bool,
    top: int | None,
    json_output: JsonOutput,
    report: Path | None,
    overwrite: bool,
) -> None:
    """Compare adapters of the same base: where they agree and where they conflict."""
    from mlx_dora.analyze.compare import compare_adapters
    from mlx_dora.analyze.table import comparison_lines

    _check_outputs(json_output, report, overwrite, *adapters, model)
    with WorkDisplay() as display:
        comparison = compare_adapters(
            adapters, model, check_base=check_base, progress=display.progress
        )
    _print(comparison_lines(comparison, top=top))
    _write(comparison, json_output, report, None)


@command.command(
    "models",
    examples=(
        "mlx_dora.analyze models BASE TUNED --by module",
        "mlx_dora.analyze models BASE TUNED --spectrum --report report.html",
    ),
)
@click.argument("base", type=PATH_OR_ID)
@click.argument("tuned", type=PATH_OR_ID)
@click.option(
    "--spectrum",
    is_flag=True,
    help="Also compute the singular values of each update; slow for large matrices.",
)
@_BY
@_output_options
def models_command(
    base: str,
    tuned: str,
    spectrum: bool,
    by: str,
    top: int | None,
    json_output: JsonOutput,
    report: Path | None,
    overwrite: bool,
) -> None:
    """Compare two model folders, a few rows at a time."""
    from mlx_dora.analyze.finetune import analyze_finetune
    from mlx_dora.analyze.table import analysis_lines

    _check_outputs(json_output, report, overwrite, base, tuned)
    with WorkDisplay() as display:
        analysis = analyze_finetune(
            base, tuned, spectrum=spectrum, progress=display.progress
        )
    _print(analysis_lines(analysis, by=by, top=top))
    _write(analysis, json_output, report, None)


def _check_outputs(
    json_output: JsonOutput,
    report: Path | None,
    overwrite: bool,
    *inputs: str | None,
) -> None:
    from mlx_dora.io.output import check_output_file

    json_output.check(*inputs)
    if report is not None:
        inputs_of_report = (*inputs, json_output.file)
        check_output_file(report, inputs=inputs_of_report, overwrite=overwrite)


def _print(lines: list[str]) -> None:
    for line in lines:
        echo(line, bold="ΔM rel." in line)


def _write(
    result: "AdaptationAnalysis | AdapterComparison",
    json_output: JsonOutput,
    report: Path | None,
    log: Path | None,
) -> None:
    from mlx_dora.analyze.report import render_report
    from mlx_dora.io.atomic import write_text

    content: dict[str, Any] = result.to_dict()
    json_output.write(content)
    if report is not None:
        write_text(report, render_report(content, log, command_line()))
        echo(f"Saved {report}")
