"""Shared behavior of commands: one-line errors, exit codes, OpenBLAS before MLX.

A command file is ``mlx_dora/cli/<verb>.py`` and holds one click command named
``command``::

    from mlx_dora.adapters.config import DoRAConfig
    from mlx_dora.cli._config_file import config_file_option
    from mlx_dora.cli._framework import verb
    from mlx_dora.cli._options import dataclass_options


    @verb("train")
    @config_file_option
    @dataclass_options(train=TrainConfig, dora=DoRAConfig)
    def command(train: TrainConfig, dora: DoRAConfig) -> None:
        "Fine-tune a model with DoRA."  # the help text
        from mlx_dora.train.run.finetune import finetune  # mlx only from here on

Code at module level must not import mlx or mlx_lm, not even indirectly: ``--help`` must
stay fast, and OpenBLAS must be loaded before MLX. Results go to stdout with
`mlx_dora.cli._echo.echo`; progress, warnings and the library's log messages of level
warning or above go to stderr.
"""

import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import click

from mlx_dora import openblas
from mlx_dora.cli._echo import echo
from mlx_dora.cli._environment import multiply_exactly, settle_environment
from mlx_dora.cli._help import Described, check_subcommand, described_mistake
from mlx_dora.cli._log import settled_output
from mlx_dora.errors import MAX_LENGTH, DoRAError, printable
from mlx_dora.io.stops import Stopped, raising_stops

EXIT_BAD_INPUT = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

SETTINGS = {
    "help_option_names": ["-h", "--help"],
    "max_content_width": 80,
    "show_default": True,
}
"""The context settings of all commands."""


def _describe(error: OSError) -> str:
    if error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def _show_error(message: str, where: str = "") -> None:
    # Some of click's messages span several lines.
    text = " ".join(line.strip() for line in message.split("\n"))
    echo(f"Error: {printable(text, MAX_LENGTH)}{where}", err=True)


class Boundary(Described):
    """Turns errors that a user can fix into one line on stderr and an exit code.

    0: success. 1: `DoRAError` or `OSError`. 2: wrong usage. 130: Ctrl-C. 143: SIGTERM.
    129: SIGHUP. Any other exception is a bug and keeps its traceback.
    """

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        if not standalone_mode:
            return super().main(*args, standalone_mode=False, **extra)
        try:
            settle_environment()
            result = super().main(*args, standalone_mode=False, **extra)
        except click.exceptions.NoArgsIsHelpError as error:
            click.echo(error.format_message())
            sys.exit(error.exit_code)
        except click.UsageError as error:
            where = f" (see {error.ctx.command_path} --help)" if error.ctx else ""
            _show_error(described_mistake(error), where)
            sys.exit(EXIT_USAGE)
        except click.ClickException as error:
            _show_error(error.format_message())
            sys.exit(error.exit_code)
        except DoRAError as error:
            _show_error(str(error))
            sys.exit(EXIT_BAD_INPUT)
        except OSError as error:
            _show_error(_describe(error))
            sys.exit(EXIT_BAD_INPUT)
        except (click.Abort, KeyboardInterrupt) as error:
            # click replaces an interrupt with an Abort.
            cause = error.__cause__ if isinstance(error, click.Abort) else error
            stopped = isinstance(cause, Stopped)
            echo(f"{cause}." if stopped else "Interrupted.", err=True)
            sys.exit(exit_code_of(cause))
        sys.exit(result if isinstance(result, int) else 0)


def exit_code_of(interrupt: BaseException | None) -> int:
    """Return 128 plus the signal's number, the shell's code for a killed process."""
    return (
        128 + interrupt.number if isinstance(interrupt, Stopped) else EXIT_INTERRUPTED
    )


class Verb(Boundary):
    """A command that loads OpenBLAS before its body runs, and so before MLX."""

    unwinds = True
    """Whether SIGTERM and SIGHUP raise an exception, so that the command cleans up."""

    def invoke(self, ctx: click.Context) -> Any:
        with settled_output(ctx), raising_stops() if self.unwinds else nullcontext():
            openblas.preload()
            multiply_exactly(ctx.command_path)
            return super().invoke(ctx)


class VerbGroup(Boundary, click.Group):
    """A verb with subcommands, for example ``mlx_dora.merge adapters``."""

    command_class = Verb

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        check_subcommand(ctx, args, self.list_commands(ctx))
        return super().resolve_command(ctx, args)


class PassThrough(Verb):
    """A command that keeps its arguments, including ``--help``, in `ctx.args`.

    It takes only the general options and its own out. The host command handles signals
    itself.
    """

    unwinds = False

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ours: list[str] = []
        rest: list[str] = []
        left = list(args)
        options = (*self.general, *self.params)
        known = {
            flag: option
            for option in options
            if isinstance(option, click.Option)
            for flag in option.opts
        }
        while left:
            word = left.pop(0)
            option = known.get(word.partition("=")[0])
            if option is None:
                rest.append(word)
                continue
            ours.append(word)
            if not option.is_flag and "=" not in word:
                ours += left[:1]
                del left[:1]
            while option.multiple and left and not left[0].startswith("-"):
                ours += [word.partition("=")[0], left.pop(0)]
        super().parse_args(ctx, ours)
        ctx.args = rest
        return rest

    def invoke(self, ctx: click.Context) -> Any:
        if {"-h", "--help"} & set(ctx.args):
            # Ours first: only importing mlx-lm, which takes a second, gives the rest.
            click.echo(f"{ctx.get_help()}\n\nOptions of mlx-lm, which apply too:\n")
            sys.stdout.flush()
        return super().invoke(ctx)


def verb(
    name: str, cls: type[Verb] = Verb, *, examples: Sequence[str] = ()
) -> Callable[[Callable[..., Any]], click.Command]:
    """Turn a function into the command `name`; its docstring becomes the help text.

    If the function returns an int, it becomes the exit code.

    Args:
        name: The verb as typed after ``mlx_dora``.
        cls: `Verb`, or `PassThrough` for a command that parses its own arguments.
        examples: Command lines for the help.
    """
    return click.command(name, cls=cls, context_settings=SETTINGS, examples=examples)


def verb_group(
    name: str, *, examples: Sequence[str] = ()
) -> Callable[[Callable[..., Any]], VerbGroup]:
    """Turn a function into a verb; ``@command.command(...)`` adds subcommands."""
    return click.group(
        name, cls=VerbGroup, context_settings=SETTINGS, examples=examples
    )
