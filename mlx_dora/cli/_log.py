"""The options ``--version``, ``-q``, ``-v`` and ``--log-file`` of every command."""

import logging
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import click

from mlx_dora import __version__
from mlx_dora.cli._echo import JSON_ON_STDOUT, RESULTS, fitted
from mlx_dora.cli._paths import FILE
from mlx_dora.errors import MAX_LENGTH, DoRAError, printable

GENERAL = "General options"
_LEVEL, _FILE = "mlx_dora.level", "mlx_dora.log_file"


def is_quiet() -> bool:
    """Whether the running command shall show no progress."""
    context = click.get_current_context(silent=True)
    return context is not None and context.meta.get(_LEVEL, 0) > logging.INFO


class GeneralOption(click.Option):
    """An option of every command, which the command's function does not receive."""

    group = GENERAL

    def __init__(self, *flags: str, **settings: Any) -> None:
        super().__init__(flags, expose_value=False, is_eager=True, **settings)


def version_option() -> click.Option:
    """Make the option ``--version``."""

    def show(context: click.Context, _option: click.Parameter, value: bool) -> None:
        if value and not context.resilient_parsing:
            click.echo(f"mlx_dora, version {__version__}")
            context.exit()

    text = "Show the version and exit."
    return GeneralOption("--version", is_flag=True, callback=show, help=text)


def log_options() -> list[click.Option]:
    """Make the options that choose what is logged, and where."""

    def keep(key: str, value: object) -> Any:
        def callback(context: click.Context, _: click.Parameter, given: Any) -> None:
            if given:
                context.meta[key] = given if value is None else value

        return callback

    return [
        GeneralOption(
            "-q",
            "--quiet",
            is_flag=True,
            callback=keep(_LEVEL, logging.WARNING),
            help="Show results, warnings and errors only, and no progress.",
        ),
        GeneralOption(
            "-v",
            "--verbose",
            is_flag=True,
            callback=keep(_LEVEL, logging.DEBUG),
            help="Show details, such as a line for each matrix.",
        ),
        GeneralOption(
            "--log-file",
            type=FILE,
            callback=keep(_FILE, None),
            help="Append everything that is shown, and the details, to this file.",
        ),
    ]


class _Console(logging.Handler):
    """Prints the library's messages to the current `sys.stderr`."""

    def emit(self, record: logging.LogRecord) -> None:
        # click.echo would bypass `sys.stderr`, which live progress bars replace to keep
        # other lines above them.
        message = printable(record.getMessage(), MAX_LENGTH)
        if record.levelno > logging.INFO:
            message = f"{record.levelname.lower()}: {message}"
        else:
            message = fitted(message, sys.stderr)
        sys.stderr.write(f"{message}\n")


class _OneLine(logging.Formatter):
    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = printable(record.message)
        return super().formatMessage(record)


@contextmanager
def logging_as_asked(level: int = logging.INFO, file: Path | None = None) -> Iterator:
    """Show the library's messages on stderr, and append all of them to a file.

    Args:
        level: Lowest level to show: info is the normal progress of the work.
        file: Log file.
    """
    logger = logging.getLogger("mlx_dora")
    before = logger.level, logger.propagate
    handlers: list[logging.Handler] = [_Console(level)]
    handlers[0].addFilter(lambda record: record.name != RESULTS.name)
    if file is not None:
        handlers.append(logging.FileHandler(file, encoding="utf-8"))
        handlers[1].setFormatter(_OneLine("%(asctime)s %(levelname)s %(message)s"))
    for handler in handlers:
        logger.addHandler(handler)
    logger.setLevel(level if file is None else logging.DEBUG)
    logger.propagate = False
    try:
        yield
    except (DoRAError, OSError, click.ClickException, KeyboardInterrupt) as error:
        if file is not None:  # the console gets it from `Boundary`
            logger.removeHandler(handlers[0])
            logger.error("%s", error or type(error).__name__)
        raise
    finally:
        for handler in handlers:
            logger.removeHandler(handler)
            handler.close()
        logger.level, logger.propagate = before[0], before[1]


@contextmanager
def settled_output(context: click.Context) -> Iterator[None]:
    """Log as the command's options say, and keep stdout free for ``--json -``."""
    level = context.meta.get(_LEVEL, logging.INFO)
    with ExitStack() as stack:
        stack.enter_context(logging_as_asked(level, context.meta.get(_FILE)))
        if context.meta.get(JSON_ON_STDOUT):
            stack.enter_context(redirect_stdout(sys.stderr))
        yield
