"""What every command shares: one-line errors, exit codes, OpenBLAS before MLX.

A command file is ``mlx_dora/cli/<verb>.py`` and holds one click command called
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

Nothing at module level may import mlx or mlx_lm, not even through a package: ``--help``
stays quick, and OpenBLAS must be loaded before MLX. Results go to stdout with
`mlx_dora.cli._echo.echo`, progress and warnings to stderr; what the library logs with a
level of warning or above is shown on stderr too.
"""

import logging
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import click

from mlx_dora import openblas
from mlx_dora.cli._echo import echo
from mlx_dora.cli._environment import settle_environment
from mlx_dora.errors import MAX_LENGTH, DoRAError, printable
from mlx_dora.io.stops import Stopped, raising_stops

EXIT_BAD_INPUT = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 88}


class _Stderr(logging.Handler):
    """Shows the library's warnings on whatever stderr is at that moment."""

    def emit(self, record: logging.LogRecord) -> None:
        # Not click.echo, which looks behind `sys.stderr` for the terminal itself: live
        # bars stand in its place to keep other lines above them.
        message = printable(record.getMessage(), MAX_LENGTH)
        sys.stderr.write(f"{record.levelname.lower()}: {message}\n")


def _show_library_warnings() -> None:
    logger = logging.getLogger("mlx_dora")
    if not any(isinstance(handler, _Stderr) for handler in logger.handlers):
        logger.addHandler(_Stderr(logging.WARNING))
        logger.propagate = False


def _describe(error: OSError) -> str:
    if error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def _show_error(message: str, where: str = "") -> None:
    # click lays some messages out over several lines.
    text = " ".join(line.strip() for line in message.split("\n"))
    echo(f"Error: {printable(text, MAX_LENGTH)}{where}", err=True)


class Boundary(click.Command):
    """Turns what a user can put right into one line on stderr and an exit code.

    0: done. 1: `DoRAError` or `OSError`. 2: wrong usage. 130: Ctrl-C, 143: SIGTERM,
    129: SIGHUP. Anything else is our bug and keeps its traceback.
    """

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        if not standalone_mode:
            return super().main(*args, standalone_mode=False, **extra)
        try:
            settle_environment()
            result = super().main(*args, standalone_mode=False, **extra)
        except click.UsageError as error:
            where = f" (see {error.ctx.command_path} --help)" if error.ctx else ""
            _show_error(error.format_message(), where)
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
            # click puts an Abort in an interrupt's place.
            cause = error.__cause__ if isinstance(error, click.Abort) else error
            stopped = isinstance(cause, Stopped)
            echo(f"{cause}." if stopped else "Interrupted.", err=True)
            sys.exit(exit_code_of(cause))
        sys.exit(result if isinstance(result, int) else 0)


def exit_code_of(interrupt: BaseException | None) -> int:
    """128 and the signal's number, as a shell gives it for a killed process."""
    return (
        128 + interrupt.number if isinstance(interrupt, Stopped) else EXIT_INTERRUPTED
    )


class Verb(Boundary):
    """A command that loads OpenBLAS before its body, and so before MLX."""

    unwinds = True
    """Whether SIGTERM and SIGHUP unwind the command, so that it cleans up."""

    def invoke(self, ctx: click.Context) -> Any:
        _show_library_warnings()
        openblas.preload()
        with raising_stops() if self.unwinds else nullcontext():
            return super().invoke(ctx)


class VerbGroup(Verb, click.Group):
    """A verb with commands of its own: ``mlx_dora.merge adapters``."""


class PassThrough(Verb):
    """A command that leaves its whole argument list, ``--help`` too, in `ctx.args`.

    Its host answers signals as it does by itself.
    """

    unwinds = False

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.args = list(args)
        return ctx.args


def verb(
    name: str, cls: type[Verb] = Verb
) -> Callable[[Callable[..., Any]], click.Command]:
    """Make a function the command `name`; its docstring becomes the help text.

    The function may return an int, which becomes the exit code.

    Args:
        name: The verb as typed after ``mlx_dora``.
        cls: `Verb`, or `PassThrough` for a command that parses its own arguments.
    """
    return click.command(name, cls=cls, context_settings=_SETTINGS)


def verb_group(name: str) -> Callable[[Callable[..., Any]], VerbGroup]:
    """Make a function a verb that has commands, added by ``@command.command(...)``."""
    return click.group(name, cls=VerbGroup, context_settings=_SETTINGS)
