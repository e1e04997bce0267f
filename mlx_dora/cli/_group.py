"""The group ``mlx_dora <verb>``, which imports a command's file when it is used."""

import difflib
from importlib import import_module

import click

from mlx_dora import __version__
from mlx_dora.cli._framework import Boundary

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


class _LazyGroup(Boundary, click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        return import_module(f"mlx_dora.cli.{cmd_name}").command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and args[0] not in VERBS:
            near = difflib.get_close_matches(args[0], VERBS)
            hint = f"did you mean {near[0]}?" if near else f"one of {', '.join(VERBS)}"
            ctx.fail(f"no command {args[0]!r}: {hint}")
        return super().resolve_command(ctx, args)


@click.group(
    "mlx_dora",
    cls=_LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 88},
)
@click.version_option(__version__, prog_name="mlx_dora")
def group() -> None:
    """DoRA for MLX: fine-tune, fuse, evaluate and run adapted language models.

    Each command is also installed as mlx_dora.COMMAND.
    """
