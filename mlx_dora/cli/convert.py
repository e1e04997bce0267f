"""``mlx_dora.convert``: converts adapters to MLX's format, PEFT, LoRA and GGUF."""

from pathlib import Path
from typing import Any, Literal, NamedTuple

import click

from mlx_dora.cli._base_model import announced_base
from mlx_dora.cli._echo import echo, note
from mlx_dora.cli._framework import verb
from mlx_dora.cli._json import JsonOutput, json_option, overwrite_option
from mlx_dora.cli._paths import PATH, PATH_OR_ID
from mlx_dora.cli._progress import WorkDisplay
from mlx_dora.cli._report import show_report


@verb(
    "convert",
    examples=(
        "mlx_dora.convert peft_adapter mlx_adapter",
        "mlx_dora.convert adapters gguf --to gguf --rank 64",
    ),
)
@click.argument("source", metavar="IN", type=PATH)
@click.argument("target", metavar="OUT", type=PATH)
@click.option(
    "--to",
    type=click.Choice(["mlx", "peft", "lora", "gguf"]),
    help="What to write: MLX's or PEFT's format; a plain LoRA of rank --rank in MLX's "
    "format; or that LoRA as GGUF for llama.cpp and Ollama. By default, MLX's or "
    "PEFT's format, the one that IN is not in.",
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
@click.option(
    "--rank",
    type=click.IntRange(min=1),
    help="With --to lora or gguf: rank of the LoRA (default 64).",
)
@click.option(
    "--data",
    type=PATH_OR_ID,
    help="With --to lora or gguf: data on which to measure the LoRA's cost in loss.",
)
@click.option(
    "--base-gguf",
    help="With --to gguf: the base that the Modelfile names, a GGUF file or a model of "
    "Ollama (default base.gguf).",
)
@json_option()
@overwrite_option()
def command(
    source: str,
    target: str,
    to: Literal["mlx", "peft", "lora", "gguf"] | None,
    model: str | None,
    base_model: str | None,
    rank: int | None,
    data: str | None,
    base_gguf: str | None,
    json_output: JsonOutput,
    overwrite: bool,
) -> None:
    """Convert a DoRA or LoRA adapter to MLX's format, PEFT's, plain LoRA or GGUF.

    Between MLX and PEFT, magnitudes and factors are preserved exactly. Anything that
    the other format cannot express (adapters of embeddings or experts, modules trained
    beside the adapter) is refused by name.

    A LoRA cannot hold the magnitudes of DoRA: --to lora and --to gguf write the nearest
    LoRA of rank --rank, and report what it misses (-v: by layer; --data: in loss). For
    a 4- or 8-bit base, the exact way is mlx_dora.fuse --mode lossless, which puts the
    magnitudes into the base's scales and keeps the rest as an exact LoRA.
    """
    json_output.check(source, model, target)
    for name, value, formats in (
        ("--rank", rank, ("lora", "gguf")),
        ("--data", data, ("lora", "gguf")),
        ("--base-gguf", base_gguf, ("gguf",)),
        ("--base-model", base_model, ("mlx", "peft", "lora", None)),
    ):
        if value is not None and to not in formats:
            raise click.UsageError(f"{name} has no effect with --to {to or 'mlx'}")
    note(f"Converting {source} ...")
    if to in ("lora", "gguf"):
        lora = _LoRAOptions(rank, data, base_gguf, base_model)
        values = _to_lora(source, target, to, model, lora, overwrite)
    else:
        values = _between(source, target, to, model, base_model, overwrite)
    json_output.write({**values, "save_path": target})


def _between(
    source: str,
    target: str,
    to: str | None,
    model: str | None,
    base_model: str | None,
    overwrite: bool,
) -> dict[str, Any]:
    from mlx_dora.peft import convert_adapter

    if to is None:
        to = "mlx" if Path(source, "adapter_model.safetensors").exists() else "peft"
    assert to in ("mlx", "peft")
    adapter = convert_adapter(
        source, target, to, model=model, base_model=base_model, overwrite=overwrite
    )
    echo(
        f"Converted {len(adapter.paths)} modules to {to} ({adapter.fine_tune_type}, "
        f"rank {adapter.config.rank}, scale {adapter.config.scale:g})"
    )
    base = adapter.base.model
    if to == "peft" and base is not None and Path(base).expanduser().exists():
        note(
            f"It records the local folder {base} as its base; --base-model ORG/NAME "
            "records a model that others have."
        )
    echo(f"Saved to {target}")
    return {
        "to": to,
        "fine_tune_type": adapter.fine_tune_type,
        "rank": adapter.config.rank,
        "scale": adapter.config.scale,
        "modules": adapter.paths,
        "base_model": base,
    }


class _LoRAOptions(NamedTuple):
    """The options that only --to lora and --to gguf have, and the base to record."""

    rank: int | None
    data: str | None
    base_gguf: str | None
    base_model: str | None


def _to_lora(
    source: str,
    target: str,
    to: str,
    model: str | None,
    options: _LoRAOptions,
    overwrite: bool,
) -> dict[str, Any]:
    from mlx_dora.export import convert_to_gguf, convert_to_lora
    from mlx_dora.export.plain_lora import DEFAULT_RANK

    if model is None:
        model = announced_base(source)
    rank, written = options.rank or DEFAULT_RANK, None
    with WorkDisplay() as display:
        if to == "lora":
            made = convert_to_lora(
                source,
                target,
                model=model,
                rank=rank,
                data=options.data,
                base_model=options.base_model,
                overwrite=overwrite,
                progress=display.progress,
            )
        else:
            made, written = convert_to_gguf(
                source,
                target,
                model=model,
                rank=rank,
                data=options.data,
                base_gguf=options.base_gguf or "base.gguf",
                overwrite=overwrite,
                progress=display.progress,
            )
    values = {"to": to, "rank": made.adapter.config.rank, **made.to_dict()}
    if written is not None:
        echo(f"GGUF of architecture {written.architecture}: {written.tensors} tensors")
        values |= {"architecture": written.architecture, "tensors": written.tensors}
    show_report(made, target)
    return values
