"""``mlx_dora.merge models``: merges several whole models."""

from dataclasses import asdict, replace
from pathlib import Path

import click
from click.core import ParameterSource

from mlx_dora.cli._echo import echo, note
from mlx_dora.cli._framework import Verb
from mlx_dora.cli._json import JsonOutput, json_option, overwrite_option
from mlx_dora.cli._merge_options import (
    DENSITY_HELP,
    METHODS_HELP,
    SCALE_HELP,
    SEED_HELP,
    Weights,
    default_method,
    fisher_option,
    own_option,
    read_weights,
    refuse_weights_as_paths,
)
from mlx_dora.cli._paths import FILE, PATH, PATH_OR_ID
from mlx_dora.cli._progress import WorkDisplay
from mlx_dora.cli._report import show_report
from mlx_dora.cli._yaml import read_yaml
from mlx_dora.merge.methods import METHODS
from mlx_dora.merge.methods.table import names_with


@click.command(
    "models",
    cls=Verb,
    examples=(
        "mlx_dora.merge models M1 M2 --save-path merged",
        "mlx_dora.merge models -c mergekit.yaml --save-path merged",
    ),
)
@click.argument("models", type=PATH_OR_ID, nargs=-1, metavar="[M1 M2 ...]")
@click.option(
    "--save-path", type=PATH, help="Output model folder; required without --dry-run."
)
@click.option("--base", type=PATH_OR_ID, help="The model that changes are relative to.")
@click.option(
    "--method",
    type=click.Choice([*METHODS]),
    metavar="NAME",
    help=METHODS_HELP,
)
@click.option(
    "--weights",
    callback=read_weights,
    help="One per model (0.3,0.7), or YAML that maps patterns of module paths to such "
    "lists; equal by default.",
)
@click.option(
    "--density",
    type=float,
    help=DENSITY_HELP,
)
@click.option(
    "--scale",
    type=float,
    help=SCALE_HELP,
)
@click.option(
    "--normalize/--no-normalize",
    default=None,
    help=f"Divide by the sum of the weights, for {names_with('normalize')}.",
)
@click.option(
    "--seed",
    default=0,
    help=SEED_HELP,
)
@own_option()
@click.option(
    "--granularity",
    type=click.Choice(["row", "tensor"]),
    default="row",
    help="Merge directions of rows, or of whole tensors as in mergekit.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    help="Dtype of the output; by default that of the base, or of the first model.",
)
@click.option("--pad", is_flag=True, help="Merge embeddings of different sizes.")
@fisher_option("model")
@click.option(
    "-c",
    "--config",
    type=FILE,
    help="A mergekit YAML file, in place of models and method. Only --seed, --pad, "
    "--dry-run, --json and --overwrite can be combined with it.",
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Check the inputs and say what each tensor would get; writes nothing.",
)
@json_option()
@overwrite_option()
def models_command(
    models: tuple[str, ...],
    save_path: str | None,
    base: str | None,
    method: str | None,
    weights: Weights | None,
    density: float | None,
    scale: float | None,
    normalize: bool | None,
    seed: int,
    own: dict[str, float],
    granularity: str,
    dtype: str | None,
    pad: bool,
    fisher: tuple[str, ...],
    config: Path | None,
    dry_run: bool,
    json_output: JsonOutput,
    overwrite: bool,
) -> None:
    """Merge whole models, one tensor at a time.

    The output has the config, tokenizer and dtypes of the base, or else of the first
    model. A killed merge resumes when the same command is run again.
    """
    if (config is None) == (not models):
        raise click.UsageError("give either models or --config")
    if save_path is None and not dry_run:
        raise click.UsageError("give --save-path, or --dry-run")
    note("Planning a merge of models ..." if dry_run else "Merging models ...")
    from mlx_dora.merge.models import dry_run as planning
    from mlx_dora.merge.models.merge import run_merge
    from mlx_dora.merge.models.mergekit import read_mergekit
    from mlx_dora.merge.models.plan import plan_models

    json_output.check(*models, base, config, save_path)
    if config is not None:
        _refuse_beside_config(click.get_current_context())
        plan = replace(read_mergekit(read_yaml(config)), seed=seed, pad=pad)
    else:
        refuse_weights_as_paths(models)
        given = {"density": density, "lambda": scale, "normalize": normalize}
        given = {key: value for key, value in given.items() if value is not None}
        given |= {"seed": seed, "granularity": granularity, "pad": pad, **own}
        plan = plan_models(
            models,
            base=base,
            method=method or default_method(len(models)),
            weights=weights,
            parameters=given,
            dtype=dtype,
            fisher=fisher or None,
        )
    if save_path is None or dry_run:
        planned = planning.dry_run(plan)
        for line in planned.lines():
            echo(line)
        json_output.write(asdict(planned))
        return
    with WorkDisplay(with_memory=True) as display:
        report = run_merge(
            plan,
            save_path,
            inputs=(config,),
            overwrite=overwrite,
            progress=display.progress,
        )
    show_report(report, save_path)
    json_output.write({**asdict(report), "save_path": save_path})


def _refuse_beside_config(context: click.Context) -> None:
    """Refuse options that the file sets."""
    free = (
        "config",
        "save_path",
        "overwrite",
        "seed",
        "pad",
        "models",
        "dry_run",
        "json_output",
    )
    given = [
        f"--{name.replace('_', '-')}"
        for name in context.params
        if name not in free
        and context.get_parameter_source(name) == ParameterSource.COMMANDLINE
    ]
    if given:
        raise click.UsageError(
            f"{', '.join(given)}: set by the --config file; change the file instead"
        )
