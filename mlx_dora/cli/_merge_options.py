"""Options shared by several commands of ``mlx_dora.merge``."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from mlx_dora.cli._paths import PATH
from mlx_dora.cli._yaml import parse_yaml
from mlx_dora.errors import DoRAError
from mlx_dora.merge.methods.calibrations import CALIBRATIONS
from mlx_dora.merge.methods.magnitudes import RULES
from mlx_dora.merge.methods.spaces import SPACES
from mlx_dora.merge.methods.table import (
    DEFAULT,
    METHODS,
    densities,
    names_in_spaces,
    names_with,
    own_parameters,
)

DEFAULT_OF_MANY = "karcher"


def described(entries: Mapping[str, Any]) -> str:
    """Names and summaries of a table's entries, for a help text."""
    return "; ".join(f"{name} ({entry.summary})" for name, entry in entries.items())


METHODS_HELP = (
    f"Merge method: {', '.join(METHODS)}; by default {DEFAULT} for two inputs and "
    f"{DEFAULT_OF_MANY}, its equal, for more."
)
SEED_HELP = f"Random seed, for {names_with('seed')}."
SCALE_HELP = f"Factor on the merged changes, for {names_with('lambda')}."
DENSITY_HELP = f"Fraction of the changes to keep (default: {densities()})."
SPACE_HELP = (
    f"Coordinates in which the method merges the updates, for "
    f"{', '.join(names_in_spaces())}: {described(SPACES)}. By default the method's own."
)
CALIBRATE_HELP = f"Before the merge, for every method: {described(CALIBRATIONS)}."
MAGNITUDES_HELP = (
    f"Merged magnitudes: {described(RULES)}. By default the method's own rule: means "
    "average the lengths, sums have the length of the sum, and methods on changes also "
    "merge the changes of lengths."
)
OWN_HELP = (
    "A parameter of one method, NAME=VALUE: "
    + ", ".join(
        f"{p.name} of {names_with(p.name).replace(', ', ' and ')} ({p.help}"
        + (f"; default {p.default:g})" if p.default is not None else ")")
        for p in own_parameters().values()
    )
    + ". Repeatable."
)
Weights = Sequence[float] | Mapping[str, Sequence[float]]


def read_weights(
    context: click.Context, option: click.Parameter, value: str | None
) -> Weights | None:
    """Parse ``0.3,0.7``, or YAML that maps patterns to lists."""
    if value is None:
        return None
    try:
        weights = parse_yaml(value if value[:1] in "[{" else f"[{value}]", repr(value))
    except DoRAError as error:
        raise click.BadParameter(
            f"{value!r} is not a list of weights, such as 0.3,0.7."
        ) from error
    if not isinstance(weights, list | dict):
        raise click.BadParameter(
            f"{value!r} is not a list of weights, such as 0.3,0.7."
        )
    return weights


def default_method(count: int) -> str:
    """Return the method to use if none is given."""
    return DEFAULT if count <= 2 else DEFAULT_OF_MANY


def refuse_weights_as_paths(paths: Sequence[str]) -> None:
    """Refuse inputs that are numbers, which ``--weights 0.5 0.5`` leaves over."""
    for path in paths:
        try:
            float(path)
        except ValueError:
            continue
        if not Path(path).exists():
            raise click.UsageError(
                f"{path} is not a folder; write weights with commas: --weights 0.3,0.7"
            )


def fisher_option(whose: str) -> Callable[[Any], Any]:
    return click.option(
        "--fisher",
        type=PATH,
        multiple=True,
        help=f"For --method fisher: a folder written by `fisher`. Repeat for each "
        f"{whose}, in order.",
    )


def own_option() -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The option for parameters that only some methods have."""
    return click.option(
        "--set",
        "own",
        multiple=True,
        metavar="NAME=VALUE",
        callback=_read_own,
        help=OWN_HELP,
    )


def _read_own(
    context: click.Context, option: click.Parameter, values: tuple[str, ...]
) -> dict[str, float]:
    """Parse ``gamma=0.02``."""
    own: dict[str, float] = {}
    for value in values:
        name, _, number = value.partition("=")
        if name not in own_parameters():
            raise click.BadParameter(
                f"expected NAME=VALUE with a name of {', '.join(own_parameters())}, "
                f"got {value!r}."
            )
        try:
            own[name] = float(number)
        except ValueError as error:
            raise click.BadParameter(
                f"{name} needs a number, got {number!r}."
            ) from error
    return own
