"""``mlx_dora.generate``: runs mlx-lm's command of that name with the same arguments."""

import click

from mlx_dora.cli._base_model import with_recorded_base
from mlx_dora.cli._framework import PassThrough, verb
from mlx_dora.cli._host import run_host_command


@verb(
    "generate",
    cls=PassThrough,
    examples=(
        "mlx_dora.generate --adapter-path adapters --prompt Hello",
        "mlx_dora.generate --model MODEL --prompt Hello --max-tokens 200",
    ),
)
@click.pass_context
def command(ctx: click.Context) -> None:
    """Generate text, like mlx_lm.generate, using mlx_dora's layers.

    The processes of mlx.launch divide the model between them.
    """
    args = with_recorded_base(ctx.args)
    run_host_command("generate", ctx.command_path, args, is_divided=True)
