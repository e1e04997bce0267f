"""``mlx_dora.server``: mlx-lm's server with checked requests, or several adapters."""

import dataclasses

import click
from click.core import ParameterSource

from mlx_dora.cli._base_model import announced_base, with_recorded_base
from mlx_dora.cli._echo import note
from mlx_dora.cli._framework import PassThrough, verb
from mlx_dora.cli._help import added_options
from mlx_dora.cli._host import run_host_command
from mlx_dora.cli._options import dataclass_options
from mlx_dora.errors import DoRAError
from mlx_dora.serve.config import ServeConfig


@verb(
    "server",
    cls=PassThrough,
    examples=(
        "mlx_dora.server --model MODEL --adapter poet=FOLDER --adapter coder=FOLDER",
        "mlx_dora.server --adapter-path adapters --port 8080",
        "mlx_dora.server --model MODEL --adapter-root FOLDER",
    ),
)
@dataclass_options(config=ServeConfig)
@click.pass_context
def command(ctx: click.Context, config: ServeConfig) -> None:
    """Serve a model over HTTP, like mlx_lm.server, using mlx_dora's layers.

    With --adapter, one batch serves requests for several adapters and for the base.
    Without it, one adapter is active at a time, as in mlx_lm.server; --adapter-root DIR
    then names the only models and adapters, in folders below DIR, that a request may
    choose.
    """
    args = list(ctx.args)
    wants_help = bool({"-h", "--help"} & set(args))
    if config.adapter:
        if not wants_help:
            note(f"Loading adapters {', '.join(config.folders())} and their base ...")
            if "--model" not in {arg.partition("=")[0] for arg in args}:
                first = next(iter(config.folders().values()))
                args = ["--model", announced_base(str(first)), *args]

        def main() -> None:
            from mlx_dora.serve.many import main as serve_many

            serve_many(config)

    else:
        _refuse_unused(ctx)
        args = with_recorded_base(args, otherwise="Starting the server ...")

        def main() -> None:
            from mlx_dora.serve.host import main

            main(config.root())

    try:
        run_host_command("server", ctx.command_path, args, main)
    finally:
        if wants_help:
            click.echo(f"\nadded by mlx_dora:\n{added_options(ctx.command)}")


def _refuse_unused(ctx: click.Context) -> None:
    """Refuse options that only several adapters use."""
    for field in dataclasses.fields(ServeConfig):
        source = ctx.get_parameter_source(field.name)
        if field.name != "adapter_root" and source == ParameterSource.COMMANDLINE:
            flag = "--" + field.name.replace("_", "-")
            raise DoRAError(f"{flag} needs --adapter NAME=FOLDER.")
