"""Repairs or reports what a process may lack when it starts."""

import locale
import os
import re
import sys
from pathlib import Path

import click

from mlx_dora.errors import DoRAError
from mlx_dora.openblas import computes_on_linux_cpu

EXACT = {"analyze", "convert", "extract", "fuse", "merge"}
"""Verbs that compute in full float32."""


def settle_environment() -> None:
    """Replace closed standard streams and a missing TMPDIR; check the working folder.

    MLX treats file number 0 as a failure to open, so no data file may get that number.
    Its compiler needs a folder for temporary files. MLX accepts only UTF-8 names.
    `mx.compile` is turned off on a Linux CPU: there it makes a training step 4 % faster
    and runs g++ for every new kernel, 24 s in all for a first training.

    Raises:
        DoRAError: If the working folder's name cannot be passed to MLX.
    """
    open_standard_streams()
    folder = os.environ.get("TMPDIR")
    if folder and not Path(folder).is_dir():
        del os.environ["TMPDIR"]
        click.echo(
            f"warning: TMPDIR {folder!r} is not a folder; using the system's.", err=True
        )
    check_encodable(str(Path.cwd()))
    if computes_on_linux_cpu():
        os.environ.setdefault("MLX_DISABLE_COMPILE", "1")


def multiply_exactly(command_path: str) -> None:
    """Turn TF32 off for the commands whose results are files in full precision.

    On NVIDIA GPUs and new Apple chips, MLX rounds the factors of float32 products to 10
    bits of mantissa. That hardly matters in training, but fused and merged weights and
    small angles would show it. MLX reads the variable at its first product.

    Args:
        command_path: The command as typed, for example ``mlx_dora.merge adapters``.
    """
    if EXACT & set(re.split(r"[ ./]", command_path)):
        os.environ.setdefault("MLX_ENABLE_TF32", "0")


def open_standard_streams() -> None:
    """Open the null device for stdin, stdout and stderr if the caller closed them."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            stream = Path(os.devnull).open(mode, encoding="utf-8")  # noqa: SIM115 - stays
            setattr(sys, name, stream)


def check_encodable(path: str) -> None:
    """Refuse a path that cannot be encoded in UTF-8, which MLX requires.

    Raises:
        DoRAError: If it cannot; says whether the name or the locale is the cause.
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
