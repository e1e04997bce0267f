"""``mlx_dora.merge``: merges several adapters, or several models."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import click

from mlx_dora.cli._base_model import announced_base, check_base_option
from mlx_dora.cli._echo import echo, note
from mlx_dora.cli._framework import verb_group
from mlx_dora.cli._json import JsonOutput, json_option, overwrite_option
from mlx_dora.cli._merge_models import models_command
from mlx_dora.cli._merge_options import (
    CALIBRATE_HELP,
    DENSITY_HELP,
    MAGNITUDES_HELP,
    METHODS_HELP,
    SCALE_HELP,
    SEED_HELP,
    SPACE_HELP,
    Weights,
    default_method,
    fisher_option,
    own_option,
    read_weights,
    refuse_weights_as_paths,
)
from mlx_dora.cli._options import dataclass_options
from mlx_dora.cli._paths import PATH, PATH_OR_ID
from mlx_dora.cli._progress import WorkDisplay
from mlx_dora.cli._report import show_report
from mlx_dora.errors import DoRAError
from mlx_dora.merge.choice.config import ROWS
from mlx_dora.merge.fisher.config import FisherConfig
from mlx_dora.merge.methods import METHODS
from mlx_dora.merge.methods.calibrations import CALIBRATIONS
from mlx_dora.merge.methods.magnitudes import RULES
from mlx_dora.merge.methods.spaces import SPACES
from mlx_dora.merge.methods.table import exact_names

if TYPE_CHECKING:
    from mlx_dora.analyze.guidance import Advice
    from mlx_dora.merge.adapters.dense import Options
    from mlx_dora.merge.choice import MergeChoice

AUTO = "auto"


@verb_group(
    "merge",
    examples=(
        "mlx_dora.merge adapters A1 A2 --save-path merged",
        "mlx_dora.merge models M1 M2 --save-path merged --method slerp",
    ),
)
def command() -> None:
    """Merge adapters or models by magnitude and direction."""


@command.command(
    "adapters",
    examples=(
        "mlx_dora.merge adapters A1 A2 --save-path merged --weights 0.3,0.7",
        "mlx_dora.merge adapters A1 A2 A3 --save-path merged --method karcher",
    ),
)
@click.argument("adapters", type=PATH, nargs=-1, required=True, metavar="A1 A2 ...")
@click.option(
    "--model",
    type=PATH_OR_ID,
    help="The base model; by default the base recorded in the first adapter.",
)
@click.option("--save-path", type=PATH, required=True, help="Output adapter folder.")
@click.option(
    "--method",
    type=click.Choice([*METHODS, AUTO]),
    metavar="NAME",
    help=f"{METHODS_HELP} auto with --data tries methods, weights and densities on "
    "rows of the data, and chooses by the task that gains least; without --data it "
    "compares the adapters and uses the method that this suggests. Exact, without a "
    f"dense weight: {exact_names()}.",
)
@click.option(
    "--weights",
    callback=read_weights,
    help="One per adapter (0.3,0.7), or YAML that maps patterns of module paths to "
    "such lists; equal by default.",
)
@click.option(
    "--rank", type=click.IntRange(min=1), help="Maximum rank of the merged updates."
)
@click.option(
    "--logit-error",
    type=PATH_OR_ID,
    metavar="DATA",
    help="Report, per layer, how much the rank cut changes the logits on DATA (needs "
    "--rank).",
)
@click.option(
    "--density",
    type=float,
    help=DENSITY_HELP,
)
@click.option(
    "--seed",
    default=0,
    help=SEED_HELP,
)
@click.option(
    "--scale",
    default=1.0,
    help=SCALE_HELP,
)
@own_option()
@click.option("--space", type=click.Choice([*SPACES]), help=SPACE_HELP)
@click.option("--calibrate", type=click.Choice([*CALIBRATIONS]), help=CALIBRATE_HELP)
@click.option("--magnitudes", type=click.Choice([*RULES]), help=MAGNITUDES_HELP)
@json_option()
@overwrite_option()
@check_base_option
@fisher_option("adapter")
@click.option(
    "--data",
    type=PATH_OR_ID,
    multiple=True,
    help="For --method auto: data of a task, on which to try merges; repeat for each "
    "task. For --method fisher: data of an adapter, to estimate its Fisher "
    "information on with the defaults of `fisher`; repeat for each adapter, in order.",
)
@click.option(
    "--rows",
    type=click.IntRange(min=1),
    help="For --method auto with --data: rows of each task to try merges on (default: "
    f"{ROWS}).",
)
def adapters_command(
    adapters: tuple[str, ...],
    model: str | None,
    save_path: str,
    method: str | None,
    weights: Weights | None,
    rank: int | None,
    logit_error: str | None,
    density: float | None,
    seed: int,
    scale: float,
    own: dict[str, float],
    space: str | None,
    calibrate: str | None,
    magnitudes: str | None,
    json_output: JsonOutput,
    overwrite: bool,
    check_base: bool,
    fisher: tuple[str, ...],
    data: tuple[str, ...],
    rows: int | None,
) -> None:
    """Merge DoRA and LoRA adapters of one base into one DoRA adapter.

    Ranks, scales and modules may differ. The result is an ordinary adapter folder. -v
    shows each matrix.
    """
    refuse_weights_as_paths(adapters)
    note(f"Merging {len(adapters)} adapters ...")
    if len(adapters) == 1:
        note("Only one adapter is given: the result is the same adapter.")
    from mlx_dora.adapters.recorded_base import recorded_base
    from mlx_dora.io.atomic import check_output
    from mlx_dora.merge.adapters.dense import Options
    from mlx_dora.merge.adapters.merge import merge_adapters_report

    options = Options(
        density=density,
        seed=seed,
        scale=scale,
        own=own,
        space=space,
        magnitudes=magnitudes,
        calibrate=calibrate,
    )
    tries = method == AUTO and bool(data)
    if tries:
        _check_free(weights, options)
    else:
        _check_untried(method, fisher, data, rows)
    if logit_error and rank is None:
        raise click.UsageError("--logit-error needs --rank")
    model = model or recorded_base(adapters[0])
    json_output.check(*adapters, model, save_path)
    if method is None:
        method = default_method(len(adapters))
    chosen: dict[str, Any] = {}
    if method == AUTO:  # slow: check the output first
        inputs = (*adapters, model, logit_error, *fisher, *data)
        check_output(save_path, inputs=inputs, overwrite=overwrite)
    if tries:
        choice = _tried(adapters, model, data, rows or ROWS, rank, seed, check_base)
        chosen, best = {"choice": choice.to_dict()}, choice.best.candidate
        method, weights, data = best.method, best.weights, ()
        options = best.options(seed)
    elif method == AUTO:
        advice = _suggested_merge(adapters, model, check_base)
        method, weights = str(advice.method), weights or advice.weights
        options = replace(options, space=space or advice.space)
    with WorkDisplay(with_memory=True) as display:
        report = merge_adapters_report(
            adapters,
            model=model,
            method=method,
            weights=weights,
            rank=rank,
            save_path=save_path,
            overwrite=overwrite,
            check_base=check_base,
            options=options,
            fisher=fisher or None,
            data=data,
            probe=logit_error,
            progress=display.progress,
        )
    show_report(report, save_path)
    json_output.write({**report.to_dict(), **chosen, "save_path": save_path})


def _check_free(weights: Weights | None, options: "Options") -> None:
    """Refuse settings that trying merges on data would choose."""
    if weights or options.given() or options.named:
        raise click.UsageError(
            "--method auto with --data chooses the settings: leave out --weights, "
            "--density, --scale, --set, --space, --magnitudes and --calibrate, or name "
            "a --method"
        )


def _check_untried(
    method: str | None, fisher: Sequence[str], data: Sequence[str], rows: int | None
) -> None:
    """Refuse data and rows that no merge would be tried on."""
    informed = [name for name, entry in METHODS.items() if entry.needs_fisher]
    if data and (fisher or method not in informed):
        raise click.UsageError(
            "--data needs --method auto, or --method fisher without --fisher"
        )
    if rows is not None:
        raise click.UsageError("--rows needs --method auto with --data")


def _tried(
    adapters: Sequence[str],
    base: str,
    data: Sequence[str],
    rows: int,
    rank: int | None,
    seed: int,
    check_base: bool,
) -> "MergeChoice":
    """Choose a merge by trying candidates on data; prints what was tried."""
    from mlx_dora.merge.choice import choose_merge

    with WorkDisplay(with_memory=True) as display:
        choice = choose_merge(
            adapters,
            model=base,
            data=data,
            rows=rows,
            rank=rank,
            seed=seed,
            check_base=check_base,
            progress=display.progress,
        )
    for line in choice.lines():
        echo(line)
    return choice


def _suggested_merge(adapters: Sequence[str], base: str, check_base: bool) -> "Advice":
    """Choose method and weights by comparing the adapters; prints the reasons."""
    from mlx_dora.analyze import compare_adapters

    with WorkDisplay(with_memory=True) as display:
        comparison = compare_adapters(
            adapters, base, check_base=check_base, progress=display.progress
        )
    for advice in comparison.guidance:
        echo(advice.sentence)
    choice = next((advice for advice in comparison.guidance if advice.method), None)
    if choice is None:
        raise DoRAError(
            "the comparison suggests no way to merge these adapters; to merge them "
            "anyway, give --data, or name a --method and --weights."
        )
    echo(f"Method: {choice.method}")
    return choice


@command.command(
    "fisher",
    examples=(
        "mlx_dora.merge fisher --adapter-path A1 --data FOLDER --save-path f1",
        "mlx_dora.merge fisher --model MODEL --data FOLDER --save-path f1",
    ),
)
@dataclass_options(config=FisherConfig, exclude=("mask_prompt", "all_turns"))
@click.option(
    "--model",
    type=PATH_OR_ID,
    help="The model; by default the base that the adapter records.",
)
@click.option(
    "--adapter-path", type=PATH, help="Estimate the information of this adapter."
)
@click.option(
    "--key",
    "keys",
    multiple=True,
    help="A module to include (self_attn.q_proj, or a full path); by default the "
    "adapter's modules, or all linear layers of the blocks. Repeatable.",
)
@click.option("--save-path", type=PATH, required=True, help="Output folder.")
@json_option()
@overwrite_option()
def fisher_command(
    config: FisherConfig,
    model: str | None,
    adapter_path: str | None,
    keys: tuple[str, ...],
    save_path: str,
    json_output: JsonOutput,
    overwrite: bool,
) -> None:
    """Estimate Fisher information on data, for --method fisher.

    The information is the mean squared gradient, over the rows of the data, of each
    output row or element of the linear layers. Use the saved folder with `--fisher` of
    `adapters` and `models`.
    """
    if model is None and adapter_path is None:
        raise click.UsageError("give --model or --adapter-path")
    note(f"Estimating Fisher information on {config.data} ...")
    from mlx_dora.merge.fisher.estimate import write_fisher

    json_output.check(model, adapter_path, config.data, save_path)
    if model is None:
        model = announced_base(str(adapter_path))
    with WorkDisplay(with_memory=True) as display:
        facts = write_fisher(
            model,
            save_path,
            adapter=adapter_path,
            keys=keys or None,
            config=config,
            overwrite=overwrite,
            progress=display.progress,
        )
    echo(
        f"Information by {facts.granularity} from {facts.tokens:,} targets "
        f"({facts.labels}) in {facts.rows} rows."
    )
    echo(f"Saved to {save_path}")
    json_output.write({**asdict(facts), "save_path": save_path})


command.add_command(models_command)
