"""Locates the Metal sources and reads them without comments."""

import re
from pathlib import Path

from mlx_dora.errors import DoRAError

# Inside the package in a wheel, next to the package in a checkout.
_PLACES = (
    Path(__file__).parents[1] / "metal",
    Path(__file__).parents[2] / "metal",
)
# What every kernel gets before its body, in this order.
HEADERS = ("wide.h", "common.h")
_SPACES = re.compile(r"\b(?:device|constant|thread)\b")
_THREADGROUP = re.compile(r"\bthreadgroup\b")
_COMMENT = re.compile(r"/\*.*?\*/|//[^\n]*", re.DOTALL)


def source_folder() -> Path:
    """Return the folder of the ``.metal`` files.

    Raises:
        DoRAError: If the folder is missing.
    """
    for place in _PLACES:
        if (place / "common.h").is_file():
            return place
    raise DoRAError(
        f"the Metal sources are in neither {_PLACES[0]} nor {_PLACES[1]}; install "
        "mlx_dora again, or set MLX_DORA_KERNELS=reference."
    )


def read_source(name: str) -> str:
    """Return the text of a file, with comments replaced by spaces.

    MLX searches the text for attributes and shapes, including in comments.
    """
    return blank_comments((source_folder() / name).read_text(encoding="utf-8"))


def in_cuda(text: str, *, is_body: bool) -> str:
    """Translate Metal's address spaces to CUDA; `cuda_prelude.h` defines the rest.

    CUDA pointers have no address space. In a body, ``threadgroup`` declares an array
    that the block shares.
    """
    return _THREADGROUP.sub("__shared__" if is_body else "", _SPACES.sub("", text))


def blank_comments(text: str) -> str:
    """Replace every comment by spaces; lines keep their numbers."""
    return _COMMENT.sub(lambda match: re.sub(r"[^\n]", " ", match.group()), text)
