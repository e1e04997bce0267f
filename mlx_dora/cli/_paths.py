"""The type of every option and argument that accepts a path."""

import os
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from mlx_dora.cli._environment import check_encodable


class PathType(click.ParamType):
    """A path with ``~`` expanded, both on the command line and in YAML.

    Args:
        or_id: Whether the help says that a Hub id is accepted too.
        as_path: Return a `Path` instead of text.
    """

    name = "path"

    def __init__(self, *, or_id: bool = False, as_path: bool = False) -> None:
        self.as_path = as_path
        if or_id:
            self.name = "path or id"

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str | None:
        """Return the help's placeholder for the value; for an argument, its name."""
        if isinstance(param, click.Argument):
            return None
        return self.name.upper().replace(" ", "_")

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Let the shell complete a folder, or a file where one is expected."""
        return [CompletionItem(incomplete, type="file" if self.as_path else "dir")]

    def convert(self, value: Any, param: Any, ctx: Any) -> str | Path:
        """Expand and check a value.

        Raises:
            DoRAError: If the path is not UTF-8.
        """
        if not isinstance(value, str | Path):
            self.fail(f"expected a path, got {value!r:.60}.", param, ctx)
        text = os.path.expanduser(value)  # noqa: PTH111 - a Hub id must not be touched
        if "\0" in text:
            self.fail(f"{text!r:.60} holds a NUL character.", param, ctx)
        if text.startswith("~") and not os.path.lexists(text):
            self.fail(f"there is no home folder {text.split('/')[0]!r}.", param, ctx)
        check_encodable(text)
        return Path(text) if self.as_path else text


PATH = PathType()
PATH_OR_ID = PathType(or_id=True)
FILE = PathType(as_path=True)
