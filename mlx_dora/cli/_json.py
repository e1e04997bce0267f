"""The ``--json`` option: a command's results as JSON, in a file or on stdout."""

import json
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, TextIO

import click

from mlx_dora.cli._echo import JSON_ON_STDOUT, echo
from mlx_dora.cli._help import GroupedOption
from mlx_dora.cli._paths import PATH

STDOUT = "-"
_OVERWRITE = "mlx_dora.overwrite"


class JsonOutput:
    """Where a command writes its results as JSON, if anywhere.

    Args:
        path: The file, ``"-"`` for stdout, or None for nowhere.
        stdout: The stream for ``"-"``.
    """

    def __init__(self, path: str | None, stdout: TextIO) -> None:
        self._file = None if path is None or path == STDOUT else Path(path)
        self._stdout = stdout if path == STDOUT else None

    def __str__(self) -> str:
        return STDOUT if self._stdout else str(self._file)

    @property
    def file(self) -> Path | None:
        """The file to write, if it is a file."""
        return self._file

    def check(self, *inputs: str | Path | None) -> None:
        """Refuse a file that may not be written, before any work.

        Raises:
            DoRAError: If the file exists and ``--overwrite`` is not given, or if it is
                an input.
        """
        if self._file is not None:
            from mlx_dora.io.output import check_output_file

            context = click.get_current_context()
            overwrite = context.params.get("overwrite") or context.meta.get(_OVERWRITE)
            check_output_file(self._file, inputs=inputs, overwrite=bool(overwrite))

    def write(self, values: Mapping[str, Any]) -> None:
        """Write the results; numbers that JSON cannot express become null."""
        if self._file is None and self._stdout is None:
            return
        text = json.dumps(_plain(values), indent=1, allow_nan=False) + "\n"
        if self._stdout is not None:
            self._stdout.write(text)
            self._stdout.flush()
        if self._file is not None:
            from mlx_dora.io.atomic import write_text

            write_text(self._file, text)
            echo(f"Saved {self._file}")


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value


def json_option(
    *, overwrite: bool = False, group: str = "Options"
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add ``--json``, which the function receives as ``json_output``.

    Args:
        overwrite: Also add ``--overwrite``, for a command that has no other output.
        group: Title in the help.
    """

    def take(
        context: click.Context, _option: click.Parameter, value: str | None
    ) -> JsonOutput:
        if value == STDOUT:
            context.meta[JSON_ON_STDOUT] = True
        return JsonOutput(value, sys.stdout)

    def keep(context: click.Context, _option: click.Parameter, value: bool) -> None:
        context.meta[_OVERWRITE] = value

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        if overwrite:
            function = click.option(
                "--overwrite",
                is_flag=True,
                expose_value=False,
                callback=keep,
                help="Replace an existing JSON file.",
            )(function)
        return click.option(
            "--json",
            "json_output",
            type=PATH,
            metavar="FILE",
            callback=take,
            cls=GroupedOption,
            group=group,
            help="Write the results as JSON to this file; - is stdout, which then gets "
            "nothing else.",
        )(function)

    return decorate


def overwrite_option(
    text: str = "Replace an existing output.",
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add ``--overwrite``, which also covers the JSON file."""
    return click.option("--overwrite", is_flag=True, help=text)
