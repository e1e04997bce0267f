"""``mlx_dora.chat``: mlx-lm's command of that name, argv unchanged."""

import click

from mlx_dora.cli._base_model import with_recorded_base
from mlx_dora.cli._framework import PassThrough, verb
from mlx_dora.cli._host import run_host_command


@verb("chat", cls=PassThrough)
@click.pass_context
def command(ctx: click.Context) -> None:
    """Chat with a model, as mlx_lm.chat does, on our layers."""
    run_host_command("chat", ctx.command_path, with_recorded_base(ctx.args))
