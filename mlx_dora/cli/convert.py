"""``mlx_dora.convert``: converts adapters between MLX and PEFT."""

from typing import Literal

import click

from mlx_dora.cli._echo import echo
from mlx_dora.cli._framework import verb
from mlx_dora.cli._paths import PATH, PATH_OR_ID


@verb("convert")
@click.argument("source", metavar="IN", type=PATH)
@click.argument("target", metavar="OUT", type=PATH)
@click.option(
    "--to",
    type=click.Choice(["mlx", "peft"]),
    required=True,
    help="The format to write; IN must be in the other format.",
)
@click.option(
    "--model",
    type=PATH_OR_ID,
    help="The base model as an MLX folder or Hub id. Used to translate module names "
    "to the other library's and to check names and shapes.",
)
@click.option(
    "--base-model",
    type=PATH_OR_ID,
    help="The base model that OUT records; by default, the value of --model or else "
    "the base that IN records.",
)
@click.option("--overwrite", is_flag=True, help="Replace an existing output folder.")
def command(
    source: str,
    target: str,
    to: Literal["mlx", "peft"],
    model: str | None,
    base_model: str | None,
    overwrite: bool,
) -> None:
    """Convert a DoRA or LoRA adapter between the formats of MLX and Hugging Face PEFT.

    Magnitudes and factors are preserved exactly. Anything that the other format cannot
    express (adapters of embeddings or experts, modules trained beside the adapter) is
    refused by name.
    """
    from mlx_dora.peft import convert_adapter

    adapter = convert_adapter(
        source, target, to, model=model, base_model=base_model, overwrite=overwrite
    )
    echo(
        f"Converted {len(adapter.paths)} modules ({adapter.fine_tune_type}, rank "
        f"{adapter.config.rank}, scale {adapter.config.scale:g})"
    )
    echo(f"Saved to {target}")
