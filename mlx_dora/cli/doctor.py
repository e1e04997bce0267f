"""``mlx_dora.doctor``: checks this machine's setup and mlx_dora's results on it."""

import textwrap
from dataclasses import asdict

import click

from mlx_dora.cli._echo import echo, note
from mlx_dora.cli._framework import verb
from mlx_dora.cli._json import JsonOutput, json_option
from mlx_dora.cli._paths import PATH_OR_ID

MODEL = "Kernels of the model"  # its labels repeat
WIDTH, LABEL = 80, 18
"""Columns of a line and of a label; the output fits into an issue's code block."""


@verb(
    "doctor",
    examples=(
        "mlx_dora.doctor --json -",
        "mlx_dora.doctor --model MODEL --rank 16",
    ),
)
@click.option(
    "--model",
    type=PATH_OR_ID,
    help="Also measure the kernels at the shapes of this model (folder or Hub id).",
)
@click.option(
    "--rank", type=click.IntRange(min=1), default=8, help="With --model: the rank."
)
@click.option(
    "--tokens",
    type=click.IntRange(min=1),
    default=2048,
    help="With --model: tokens of a batch, rows times length.",
)
@json_option(overwrite=True)
def command(model: str | None, rank: int, tokens: int, json_output: JsonOutput) -> int:
    """Examine this machine: versions, BLAS, memory, layers, kernels, known traps.

    Takes under a minute on a CPU, and a few minutes on a GPU, for which kernels are
    compiled. Exits with 1 if a layer or a kernel computes wrong results.
    """
    json_output.check()
    note("Examining this machine, which takes a minute or more ...")
    from mlx_dora.doctor.diagnosis import UNVERIFIED, diagnose

    diagnosis = diagnose(model, rank, tokens)
    echo(diagnosis.verdict)
    for title, rows in diagnosis.sections.items():
        echo(title)
        for label, value in rows:
            _show(f"  {label:<{LABEL}} ", value)
    echo("Known traps")
    for trap in diagnosis.traps:
        _show("  - ", trap)
    _show("", UNVERIFIED)
    sections = {
        title: [list(row) for row in rows] if title.startswith(MODEL) else dict(rows)
        for title, rows in diagnosis.sections.items()
    }
    values = {**asdict(diagnosis), "sections": sections}
    json_output.write({"verdict": diagnosis.verdict, **values})
    return 0 if diagnosis.is_healthy else 1


def _show(start: str, text: str) -> None:
    indent = " " * len(start)
    for line in textwrap.wrap(
        text, WIDTH, initial_indent=start, subsequent_indent=indent
    ):
        echo(line)
