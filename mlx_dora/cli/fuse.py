"""``mlx_dora.fuse``: an adapted model as a plain one."""

import click

from mlx_dora.cli._framework import verb


@verb("fuse")
@click.option(
    "--model", required=True, help="The base: a local model folder or Hub id."
)
@click.option(
    "--adapter-path",
    default="adapters",
    show_default=True,
    help="The trained adapter's folder.",
)
@click.option(
    "--save-path",
    default="fused_model",
    show_default=True,
    help="The folder to write the fused model to.",
)
@click.option(
    "--dequantize",
    is_flag=True,
    help="Make the whole model dense. Packing the weights again into few bits loses "
    "part of the update.",
)
@click.option("--overwrite", is_flag=True, help="Replace an existing output folder.")
@click.option(
    "--check-base/--no-check-base",
    default=True,
    help="Refuse an adapter that was trained on another model (the default).",
)
@click.option(
    "--trust-remote-code",
    is_flag=True,
    help="Run Python code that the model's folder brings along.",
)
def command(
    model: str,
    adapter_path: str,
    save_path: str,
    dequantize: bool,
    overwrite: bool,
    check_base: bool,
    trust_remote_code: bool,
) -> None:
    """Fuse a DoRA adapter into its base model.

    Writes a folder that mlx-lm loads, complete or not at all. A dense model keeps its
    dtype and size. For a quantised one, the report says what share of each layer's
    update survives packing.
    """
    from mlx_dora.adapters.fuse import fuse_model

    report = fuse_model(
        model,
        adapter_path,
        save_path,
        dequantize=dequantize,
        overwrite=overwrite,
        check_base=check_base,
        trust_remote_code=trust_remote_code,
    )
    for line in report.lines():
        click.echo(line)
    click.echo(f"Saved to {save_path}")
