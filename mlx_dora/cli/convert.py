"""``mlx_dora.convert``: converts adapters between MLX and PEFT."""

from pathlib import Path
from typing import Literal

import click

from mlx_dora.cli._echo import echo
from mlx_dora.cli._framework import verb
from mlx_dora.cli._json import JsonOutput, json_option, overwrite_option
from mlx_dora.cli._paths import PATH, PATH_OR_ID


@verb(
    "convert",
    examples=(
        "mlx_dora.convert peft_adapter mlx_adapter",
        "mlx_dora.convert adapters peft_adapter --base-model ORG/NAME",
    ),
)
@click.argument("source", metavar="IN", type=PATH)
@click.argument("target", metavar="OUT", type=PATH)
@click.option(
    "--to",
    type=click.Choice(["mlx", "peft"]),
    help="The format to write; by default, the one that IN is not in.",
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
@json_option()
@overwrite_option()
def command(
    source: str,
    target: str,
    to: Literal["mlx", "peft"] | None,
    model: str | None,
    base_model: str | None,
    json_output: JsonOutput,
    overwrite: bool,
) -> None:
    """Convert a DoRA or LoRA adapter between the formats of MLX and Hugging Face PEFT.

    Magnitudes and factors are preserved exactly. Anything that the other format cannot
    express (adapters of embeddings or experts, modules trained beside the adapter) is
    refused by name.
    """
    from mlx_dora.peft import convert_adapter

    json_output.check(source, model, target)
    if to is None:
        to = "mlx" if Path(source, "adapter_model.safetensors").exists() else "peft"
    adapter = convert_adapter(
        source, target, to, model=model, base_model=base_model, overwrite=overwrite
    )
    echo(
        f"Converted {len(adapter.paths)} modules to {to} ({adapter.fine_tune_type}, "
        f"rank {adapter.config.rank}, scale {adapter.config.scale:g})"
    )
    echo(f"Saved to {target}")
    json_output.write(
        {
            "to": to,
            "fine_tune_type": adapter.fine_tune_type,
            "rank": adapter.config.rank,
            "scale": adapter.config.scale,
            "modules": adapter.paths,
            "base_model": adapter.base.model,
            "save_path": target,
        }
    )
