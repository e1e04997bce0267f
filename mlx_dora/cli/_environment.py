"""What a process may lack when it starts, and what then is done about it."""

import locale
import os
import sys
from pathlib import Path

import click

from mlx_dora.errors import DoRAError


def settle_environment() -> None:
    """Stand in for closed standard streams and a missing TMPDIR; check the folder.

    MLX takes file 0 for a failure to open, so that no file may get that number; its
    compiler needs a folder for temporary files; and it takes names in UTF-8 alone.

    Raises:
        DoRAError: If the working folder's name cannot be passed on to MLX.
    """
    open_standard_streams()
    folder = os.environ.get("TMPDIR")
    if folder and not Path(folder).is_dir():
        del os.environ["TMPDIR"]
        click.echo(
            f"warning: TMPDIR {folder!r} is not a folder; using the system's.", err=True
        )
    check_encodable(str(Path.cwd()))


def open_standard_streams() -> None:
    """Give stdin, stdout and stderr the null device where the caller closed them."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            stream = Path(os.devnull).open(mode, encoding="utf-8")  # noqa: SIM115 - stays
            setattr(sys, name, stream)


def check_encodable(path: str) -> None:
    """Refuse a path that is not text in UTF-8, as MLX needs it.

    Raises:
        DoRAError: Saying whether the name or the locale is to blame.
    """
    try:
        path.encode()
    except UnicodeEncodeError:
        shown = ascii(path)
        if sys.getfilesystemencoding() != "utf-8":
            language = locale.setlocale(locale.LC_CTYPE)
            raise DoRAError(
                f"the path {shown} is not ASCII, which the locale ({language}) needs; "
                "set PYTHONUTF8=1 or LC_ALL=C.UTF-8."
            ) from None
        raise DoRAError(
            f"the path {shown} is not UTF-8, which MLX needs; rename it."
        ) from None
