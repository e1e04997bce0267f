"""``mlx_dora.convert``: adapters between MLX and PEFT."""

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
    help="The format to write; IN is in the other one.",
)
@click.option(
    "--model",
    type=PATH_OR_ID,
    help="The base as an MLX folder or Hub id: modules get the names that the other "
    "library has for them, and names and shapes are checked.",
)
@click.option(
    "--base-model",
    type=PATH_OR_ID,
    help="What OUT says of its base; the name given as --model, or what IN says, if "
    "not given.",
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
    """Convert a DoRA or LoRA adapter between MLX's format and Hugging Face PEFT's.

    Magnitudes and factors are kept to the last bit. What the other format cannot
    express (adapters of embeddings, experts, modules trained beside the adapter) is
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
