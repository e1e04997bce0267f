"""The Metal sources: where they lie, and their text without comments."""

import re
from pathlib import Path

from mlx_dora.errors import DoRAError

# In a wheel beside the package's code, in a checkout beside the package.
_PLACES = (
    Path(__file__).parents[1] / "metal",
    Path(__file__).parents[2] / "metal",
)
_SPACES = re.compile(r"\b(?:device|constant|thread)\b")
_THREADGROUP = re.compile(r"\bthreadgroup\b")
_COMMENT = re.compile(r"/\*.*?\*/|//[^\n]*", re.DOTALL)


def source_folder() -> Path:
    """The folder of the ``.metal`` files.

    Raises:
        DoRAError: If the installation lacks it.
    """
    for place in _PLACES:
        if (place / "common.h").is_file():
            return place
    raise DoRAError(
        f"the Metal sources are in neither {_PLACES[0]} nor {_PLACES[1]}; install "
        "mlx_dora again, or set MLX_DORA_KERNELS=reference."
    )


def read_source(name: str) -> str:
    """Text of one file with its comments blanked, line for line.

    MLX looks for attributes and shapes by plain text search, in comments too.
    """
    return blank_comments((source_folder() / name).read_text(encoding="utf-8"))


def in_cuda(text: str, *, is_body: bool) -> str:
    """Metal text with CUDA's address spaces; `cuda_prelude.h` spells the rest.

    CUDA's pointers name no address space. In a body ``threadgroup`` declares an array
    that the block shares.
    """
    return _THREADGROUP.sub("__shared__" if is_body else "", _SPACES.sub("", text))


def blank_comments(text: str) -> str:
    """The text with every comment turned into blanks; lines keep their numbers."""
    return _COMMENT.sub(lambda match: re.sub(r"[^\n]", " ", match.group()), text)
