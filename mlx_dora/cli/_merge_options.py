"""Options and arguments that several commands of ``mlx_dora.merge`` share."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import click

from mlx_dora.cli._paths import PATH
from mlx_dora.cli._yaml import parse_yaml
from mlx_dora.errors import DoRAError
from mlx_dora.merge.methods.table import densities, names_with

SEED_HELP = f"Random seed, for {names_with('seed')}."
SCALE_HELP = f"Factor on the merged changes of the base, for {names_with('lambda')}."
DENSITY_HELP = f"Share of the changes to keep (default: {densities()})."
Weights = Sequence[float] | Mapping[str, Sequence[float]]


def read_weights(
    context: click.Context, option: click.Parameter, value: str | None
) -> Weights | None:
    """``0.3,0.7``, or YAML from patterns to lists."""
    if value is None:
        return None
    try:
        weights = parse_yaml(value if value[:1] in "[{" else f"[{value}]", repr(value))
    except DoRAError as error:
        raise click.BadParameter(f"{value!r} is not a list of weights.") from error
    if not isinstance(weights, list | dict):
        raise click.BadParameter(f"{value!r} is not a list of weights.")
    return weights


def fisher_option(whose: str) -> Callable[[Any], Any]:
    return click.option(
        "--fisher",
        type=PATH,
        multiple=True,
        help=f"For --method fisher: a folder that `fisher` made, once {whose} and in "
        "their order.",
    )
