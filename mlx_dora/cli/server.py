"""``mlx_dora.server``: mlx-lm's command of that name, argv unchanged."""

import click

from mlx_dora.cli._framework import PassThrough, verb
from mlx_dora.cli._host import run_host_command


@verb("server", cls=PassThrough)
@click.pass_context
def command(ctx: click.Context) -> None:
    """Serve a model over HTTP, as mlx_lm.server does, on our layers."""
    run_host_command("server", ctx.command_path, ctx.args)
