"""``mlx_dora.merge``: several adapters, or several models, as one."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from mlx_dora.cli._echo import echo
from mlx_dora.cli._framework import verb_group
from mlx_dora.cli._options import dataclass_options
from mlx_dora.cli._paths import FILE, PATH, PATH_OR_ID
from mlx_dora.cli._progress import WorkDisplay
from mlx_dora.cli._yaml import parse_yaml, read_yaml
from mlx_dora.errors import DoRAError
from mlx_dora.merge.fisher_config import FisherConfig
from mlx_dora.merge.names import ADAPTER_METHODS, FISHER, MODEL_METHODS

AUTO = "auto"
Weights = Sequence[float] | Mapping[str, Sequence[float]]


def _read_weights(
    context: click.Context, option: click.Parameter, value: str | None
) -> Weights | None:
    """``0.3,0.7``, or YAML from patterns to lists."""
    if value is None:
        return None
    try:
        found = parse_yaml(value if value[:1] in "[{" else f"[{value}]", repr(value))
    except DoRAError as error:
        raise click.BadParameter(f"{value!r} is not a list of weights.") from error
    if not isinstance(found, list | dict):
        raise click.BadParameter(f"{value!r} is not a list of weights.")
    return found


def _fisher_option(whose: str) -> Callable[[Any], Any]:
    return click.option(
        "--fisher",
        type=PATH,
        multiple=True,
        help=f"For --method fisher: a folder that `fisher` made, once {whose} and in "
        "their order.",
    )


@verb_group("merge")
def command() -> None:
    """Merge adapters or models by magnitude and direction."""


@command.command("adapters")
@click.argument("adapters", type=PATH, nargs=-1, required=True, metavar="A1 A2 ...")
@click.option(
    "--model",
    type=PATH_OR_ID,
    help="The base; what the first adapter says of its base if not given.",
)
@click.option(
    "--save-path", type=PATH, required=True, help="The adapter folder to make."
)
@click.option(
    "--method",
    type=click.Choice([*ADAPTER_METHODS, AUTO]),
    default="slerp",
    show_default=True,
    help="How to merge. The first six are exact and need no dense weight; auto "
    "compares the adapters, takes what that suggests and says why.",
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
    type=PATH_OR_ID,
    metavar="DATA",
    help="With --rank: on a few rows of this data, say of each layer how far its cut "
    "moves the logits.",
)
@click.option(
    "--density", type=float, help="Share of the entries that ties and dare keep."
)
@click.option("--seed", default=0, show_default=True, help="Of dare's random numbers.")
@click.option(
    "--scale",
    default=1.0,
    show_default=True,
    help="Factor on the merged task vectors of the methods that have them.",
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
    type=PATH_OR_ID,
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
    from mlx_dora.adapters.recorded_base import recorded_base
    from mlx_dora.io.atomic import check_output
    from mlx_dora.merge.adapters import merge_adapters_report
    from mlx_dora.merge.cut_error import open_probe
    from mlx_dora.merge.dense import Options
    from mlx_dora.merge.estimate import estimate_on_data

    if data and (fisher or method != FISHER):
        raise click.UsageError("--data is for --method fisher without --fisher")
    if logit_error and rank is None:
        raise click.UsageError("--logit-error is for --rank")
    base = model or recorded_base(adapters[0])
    inputs = (*adapters, base, logit_error, *fisher, *data)
    # Before what takes long.
    check_output(save_path, inputs=inputs, overwrite=overwrite)
    if method == AUTO:
        method, suggested = _suggested_merge(adapters, base, check_base)
        weights = weights or suggested
    loaded, probe = open_probe(base, logit_error) if logit_error else (base, None)
    with WorkDisplay(with_memory=True) as display:
        known = (
            estimate_on_data(base, adapters, data, check_base, display.progress)
            if data
            else fisher or None
        )
        report = merge_adapters_report(
            adapters,
            model=loaded,
            method=method,
            weights=weights,
            rank=rank,
            save_path=save_path,
            overwrite=overwrite,
            check_base=check_base,
            options=Options(density=density, seed=seed, scale=scale),
            fisher=known,
            probe=probe,
            inputs=inputs,
            progress=display.progress,
        )
    for line in report.lines():
        echo(line)
    echo(f"Saved to {save_path}")


def _suggested_merge(
    adapters: Sequence[str], base: str, check_base: bool
) -> tuple[str, Sequence[float] | None]:
    """The method and weights that a comparison of the adapters suggests; says why."""
    from mlx_dora.analyze import compare_adapters

    with WorkDisplay(with_memory=True) as display:
        comparison = compare_adapters(
            adapters, base, check_base=check_base, progress=display.progress
        )
    for advice in comparison.guidance:
        echo(advice.sentence)
    found = next((one for one in comparison.guidance if one.method), None)
    if found is None or found.method is None:
        raise DoRAError(
            "the comparison suggests no way to merge these adapters; to merge them "
            "anyway, name a --method and --weights."
        )
    echo(f"Method: {found.method}")
    return found.method, found.weights


@command.command("fisher")
@dataclass_options(config=FisherConfig, exclude=("mask_prompt", "all_turns"))
@click.option(
    "--model", type=PATH_OR_ID, required=True, help="The model, or the adapter's base."
)
@click.option(
    "--adapter-path", type=PATH, help="The adapter whose information is wanted."
)
@click.option(
    "--key",
    "keys",
    multiple=True,
    help="A module to look at (self_attn.q_proj, or a full path); the adapter's, or "
    "all linear layers of the blocks, if not given.",
)
@click.option("--save-path", type=PATH, required=True, help="The folder to make.")
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
    from mlx_dora.merge.estimate import write_fisher

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


@command.command("models")
@click.argument("models", type=PATH_OR_ID, nargs=-1, metavar="[M1 M2 ...]")
@click.option("--save-path", type=PATH, required=True, help="The model folder to make.")
@click.option("--base", type=PATH_OR_ID, help="The model that changes are relative to.")
@click.option(
    "--method",
    type=click.Choice(MODEL_METHODS),
    default="slerp",
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
    "--density", type=float, help="Share of the changes to keep (ties, dare)."
)
@click.option("--scale", type=float, help="Factor on the merged changes.")
@click.option("--normalize/--no-normalize", default=None, help="Divide by the weights.")
@click.option("--seed", default=0, show_default=True, help="Of dare's random numbers.")
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
    type=FILE,
    help="A mergekit YAML file, in place of models and method.",
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
    from mlx_dora.merge.mergekit import read_mergekit
    from mlx_dora.merge.models import run_merge
    from mlx_dora.merge.plan import plan_models

    if (config is None) == (not models):
        raise click.UsageError("give either models or --config")
    if config is not None:
        plan = read_mergekit(read_yaml(config))
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
            plan,
            save_path,
            inputs=(config,),
            overwrite=overwrite,
            progress=display.progress,
        )
    for line in report.lines():
        echo(line)
    echo(f"Saved to {save_path}")
