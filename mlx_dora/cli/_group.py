"""The group ``mlx_dora <verb>``, which imports a command's file when it is used."""

from importlib import import_module

import click

from mlx_dora.cli._framework import SETTINGS, VerbGroup

VERBS = (
    "data",
    "train",
    "fuse",
    "merge",
    "extract",
    "analyze",
    "convert",
    "evaluate",
    "generate",
    "chat",
    "server",
    "doctor",
    "demo",
)


class _LazyGroup(VerbGroup):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        return import_module(f"mlx_dora.cli.{cmd_name}").command


@click.group(
    "mlx_dora",
    cls=_LazyGroup,
    context_settings=SETTINGS,
    examples=(
        "mlx_dora demo",
        "mlx_dora train --model mlx-community/SmolLM2-135M-Instruct --data my_data",
    ),
)
def group() -> None:
    """DoRA for MLX: fine-tune, fuse, evaluate and run adapted language models.

    Each command is also installed as mlx_dora.COMMAND.
    """
