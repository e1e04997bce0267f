"""``mlx_dora.chat``: runs mlx-lm's command of that name with the same arguments."""

import click

from mlx_dora.cli._base_model import with_recorded_base
from mlx_dora.cli._framework import PassThrough, verb
from mlx_dora.cli._host import run_host_command


@verb(
    "chat",
    cls=PassThrough,
    examples=("mlx_dora.chat --adapter-path adapters", "mlx_dora.chat --model MODEL"),
)
@click.pass_context
def command(ctx: click.Context) -> None:
    """Chat with a model, like mlx_lm.chat, using mlx_dora's layers."""
    run_host_command("chat", ctx.command_path, with_recorded_base(ctx.args))
