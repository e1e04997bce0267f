"""``mlx_dora.merge``: several adapters, or several models, as one."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import yaml
from click.core import ParameterSource
from yaml.composer import ComposerError

from mlx_dora.cli._framework import verb_group
from mlx_dora.cli._options import dataclass_options
from mlx_dora.cli._progress import WorkDisplay
from mlx_dora.cli._yaml import load_yaml
from mlx_dora.errors import DoRAError
from mlx_dora.merge.fisher.config import FisherConfig
from mlx_dora.merge.methods import DEFAULT, METHODS
from mlx_dora.merge.methods.table import densities, exact_names, names_with

AUTO = "auto"
_SEED_HELP = f"Random seed, for {names_with('seed')}."
_SCALE_HELP = f"Factor on the merged changes of the base, for {names_with('lambda')}."
_DENSITY_HELP = f"Share of the changes to keep (default: {densities()})."
Weights = Sequence[float] | Mapping[str, Sequence[float]]


def _read_weights(
    context: click.Context, option: click.Parameter, value: str | None
) -> Weights | None:
    """``0.3,0.7``, or YAML from patterns to lists."""
    if value is None:
        return None
    try:
        found = load_yaml(value if value[:1] in "[{" else f"[{value}]")
    except yaml.YAMLError as error:
        raise click.BadParameter(f"{value!r} is not a list of weights.") from error
    if not isinstance(found, list | dict):
        raise click.BadParameter(f"{value!r} is not a list of weights.")
    return found


def _fisher_option(whose: str) -> Callable[[Any], Any]:
    return click.option(
        "--fisher",
        multiple=True,
        help=f"For --method fisher: a folder that `fisher` made, once {whose} and in "
        "their order.",
    )


@verb_group("merge")
def command() -> None:
    """Merge adapters or models by magnitude and direction."""


@command.command("adapters")
@click.argument("adapters", nargs=-1, required=True, metavar="A1 A2 ...")
@click.option(
    "--model", help="The base; what the first adapter says of its base if not given."
)
@click.option("--save-path", required=True, help="The adapter folder to make.")
@click.option(
    "--method",
    type=click.Choice([*METHODS, AUTO]),
    default=DEFAULT,
    show_default=True,
    help="How to merge. auto compares the adapters, takes what that suggests and says "
    f"why. Exact, without a dense weight: {exact_names()}.",
)
@click.option(
    "--weights",
    callback=_read_weights,
    help="One an adapter (0.3,0.7), or YAML from patterns of module paths to such "
    "lists; equal if not given.",
)
@click.option("--rank", type=click.IntRange(min=1), help="Cut the update to this rank.")
@click.option(
    "--logit-error",
    metavar="DATA",
    help="With --rank: on a few rows of this data, say of each layer how far its cut "
    "moves the logits.",
)
@click.option(
    "--density",
    type=float,
    help=_DENSITY_HELP,
)
@click.option(
    "--seed",
    default=0,
    show_default=True,
    help=_SEED_HELP,
)
@click.option(
    "--scale",
    default=1.0,
    show_default=True,
    help=_SCALE_HELP,
)
@click.option("--overwrite", is_flag=True, help="Replace an existing output folder.")
@click.option(
    "--check-base/--no-check-base",
    default=True,
    help="Refuse an adapter of another base or quantisation (the default).",
)
@_fisher_option("an adapter")
@click.option(
    "--data",
    multiple=True,
    help="Data of an adapter, in the adapters' order: --method fisher estimates its "
    "information there, as `fisher` does if told nothing else. Say it once an adapter.",
)
def adapters_command(
    adapters: tuple[str, ...],
    model: str | None,
    save_path: str,
    method: str,
    weights: Weights | None,
    rank: int | None,
    logit_error: str | None,
    density: float | None,
    seed: int,
    scale: float,
    overwrite: bool,
    check_base: bool,
    fisher: tuple[str, ...],
    data: tuple[str, ...],
) -> None:
    """Merge DoRA and LoRA adapters of one base into one DoRA adapter.

    Ranks, scales and modules may differ. The result is an ordinary adapter folder.
    """
    from mlx_dora.io.atomic import check_output
    from mlx_dora.merge.adapters.dense import Options
    from mlx_dora.merge.adapters.folders import merge_folders

    informed = [name for name, entry in METHODS.items() if entry.needs_fisher]
    if data and (fisher or method not in informed):
        raise click.UsageError("--data is for --method fisher without --fisher")
    if logit_error and rank is None:
        raise click.UsageError("--logit-error is for --rank")
    if method == AUTO:
        check_output(save_path, overwrite=overwrite)  # before what takes long
        method, suggested = _suggested_merge(adapters, model, check_base)
        weights = weights or suggested
    with WorkDisplay(with_memory=True) as display:
        report = merge_folders(
            adapters,
            save_path,
            model=model,
            method=method,
            weights=weights,
            rank=rank,
            overwrite=overwrite,
            check_base=check_base,
            options=Options(density=density, seed=seed, scale=scale),
            fisher=fisher,
            data=data,
            logit_error=logit_error,
            progress=display.progress,
        )
    for line in report.lines():
        click.echo(line)
    click.echo(f"Saved to {save_path}")


def _suggested_merge(
    adapters: Sequence[str], model: str | None, check_base: bool
) -> tuple[str, Sequence[float] | None]:
    """The method and weights that a comparison of the adapters suggests; says why."""
    from mlx_dora.analyze import compare_adapters
    from mlx_dora.merge.adapters.fit import base_name

    base = model or base_name(adapters[0])
    with WorkDisplay(with_memory=True) as display:
        comparison = compare_adapters(
            adapters, base, check_base=check_base, progress=display.progress
        )
    for advice in comparison.guidance:
        click.echo(advice.sentence)
    found = next((one for one in comparison.guidance if one.method), None)
    if found is None or found.method is None:
        raise DoRAError(
            "the comparison suggests no way to merge these adapters; to merge them "
            "anyway, name a --method and --weights."
        )
    click.echo(f"Method: {found.method}")
    return found.method, found.weights


@command.command("fisher")
@dataclass_options(config=FisherConfig, exclude=("mask_prompt", "all_turns"))
@click.option("--model", required=True, help="The model, or the adapter's base.")
@click.option("--adapter-path", help="The adapter whose information is wanted.")
@click.option(
    "--key",
    "keys",
    multiple=True,
    help="A module to look at (self_attn.q_proj, or a full path); the adapter's, or "
    "all linear layers of the blocks, if not given.",
)
@click.option("--save-path", required=True, help="The folder to make.")
@click.option("--overwrite", is_flag=True, help="Replace an existing output folder.")
def fisher_command(
    config: FisherConfig,
    model: str,
    adapter_path: str | None,
    keys: tuple[str, ...],
    save_path: str,
    overwrite: bool,
) -> None:
    """Estimate Fisher information on data, for merges by it.

    The mean over the rows of the squared gradient of each output row, or each element,
    of the linear layers. What is saved serves `--fisher` of adapters and models.
    """
    from mlx_dora.merge.fisher.estimate import write_fisher

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
    click.echo(
        f"Information by {facts.granularity} from {facts.tokens:,} targets "
        f"({facts.labels}) in {facts.rows} rows."
    )
    click.echo(f"Saved to {save_path}")


@command.command("models")
@click.argument("models", nargs=-1, metavar="[M1 M2 ...]")
@click.option("--save-path", required=True, help="The model folder to make.")
@click.option("--base", help="The model that changes are relative to.")
@click.option(
    "--method",
    type=click.Choice([*METHODS]),
    default=DEFAULT,
    show_default=True,
    help="How to merge.",
)
@click.option(
    "--weights",
    callback=_read_weights,
    help="One a model (0.3,0.7), or YAML from patterns of module paths to such lists; "
    "equal if not given.",
)
@click.option(
    "--density",
    type=float,
    help=_DENSITY_HELP,
)
@click.option(
    "--scale",
    type=float,
    help=_SCALE_HELP,
)
@click.option(
    "--normalize/--no-normalize",
    default=None,
    help=f"Divide by the weights, for {names_with('normalize')}.",
)
@click.option(
    "--seed",
    default=0,
    show_default=True,
    help=_SEED_HELP,
)
@click.option(
    "--granularity",
    type=click.Choice(["row", "tensor"]),
    default="row",
    show_default=True,
    help="Directions of rows, or of whole tensors as in mergekit.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    help="Of the output; the base's, or the first model's, if not given.",
)
@click.option("--pad", is_flag=True, help="Merge embeddings of unlike vocabularies.")
@_fisher_option("a model")
@click.option(
    "-c",
    "--config",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="A mergekit YAML file, in place of models and method; of the other options "
    "only --seed, --pad and --overwrite go with it.",
)
@click.option("--overwrite", is_flag=True, help="Replace an existing output folder.")
def models_command(
    models: tuple[str, ...],
    save_path: str,
    base: str | None,
    method: str,
    weights: Weights | None,
    density: float | None,
    scale: float | None,
    normalize: bool | None,
    seed: int,
    granularity: str,
    dtype: str | None,
    pad: bool,
    fisher: tuple[str, ...],
    config: Path | None,
    overwrite: bool,
) -> None:
    """Merge whole models, one tensor at a time.

    The base, or else the first model, gives config, tokenizer and dtypes. A merge that
    was killed goes on where it stopped when the command is given again.
    """
    from dataclasses import replace

    from mlx_dora.merge.models.merge import run_merge
    from mlx_dora.merge.models.mergekit import read_mergekit
    from mlx_dora.merge.models.plan import plan_models

    if (config is None) == (not models):
        raise click.UsageError("give either models or --config")
    if config is not None:
        _refuse_beside_config(click.get_current_context())
        plan = replace(read_mergekit(_read_yaml(config)), seed=seed, pad=pad)
    else:
        given = {"density": density, "lambda": scale, "normalize": normalize}
        parameters = {key: value for key, value in given.items() if value is not None}
        plan = plan_models(
            models,
            base=base,
            method=method,
            weights=weights,
            parameters={
                **parameters,
                "seed": seed,
                "granularity": granularity,
                "pad": pad,
            },
            dtype=dtype,
            fisher=fisher or None,
        )
    with WorkDisplay(with_memory=True) as display:
        report = run_merge(
            plan, save_path, overwrite=overwrite, progress=display.progress
        )
    for line in report.lines():
        click.echo(line)
    click.echo(f"Saved to {save_path}")


def _refuse_beside_config(context: click.Context) -> None:
    """Refuse options that the file decides."""
    free = ("config", "save_path", "overwrite", "seed", "pad", "models")
    given = [
        f"--{name.replace('_', '-')}"
        for name in context.params
        if name not in free
        and context.get_parameter_source(name) == ParameterSource.COMMANDLINE
    ]
    if given:
        raise click.UsageError(
            f"{', '.join(given)}: the --config file decides this; change the file"
        )


def _read_yaml(path: Path) -> object:
    try:
        return load_yaml(path.read_text(encoding="utf-8"))
    except ComposerError as error:
        if "single document" not in str(error):
            raise DoRAError(f"{path}: {' '.join(str(error).split())}") from error
        raise DoRAError(
            f"{path} holds several merges (---): put each in a file of its own and run "
            "them in turn."
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DoRAError(
            f"{path} is not YAML: {' '.join(str(error).split())}"
        ) from error
