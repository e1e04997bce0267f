"""Reads and checks the header of a safetensors file before any tensor is read.

The `safetensors` library checks the format, but keeps the last of two tensors with one
name and does not return byte offsets, so the header is also parsed here.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from safetensors import SafetensorError, safe_open

from mlx_dora.errors import DoRAError

_LARGEST = 2**31 - 1
"""Largest size of an axis. MLX stores sizes in 32 bits and wraps larger ones."""


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """A tensor's entry in a header.

    Attributes:
        dtype: Dtype as spelled in the file, for example ``"BF16"``.
        shape: Shape of the tensor.
        start: Offset of its first byte from the start of the file.
        end: Offset after its last byte from the start of the file.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Size of the tensor's data in bytes."""
        return self.end - self.start


def read_header(path: str | Path) -> dict[str, TensorInfo]:
    """Read and check the header of a safetensors file, without its tensors.

    Args:
        path: A safetensors file.

    Returns:
        Dtype, shape and byte range of each tensor, by name in the header's order.

    Raises:
        DoRAError: If the file breaks a rule of the format or MLX cannot hold a shape;
            names the file and, where it applies, the tensor.
        OSError: If the file cannot be read.
    """
    return read_header_and_metadata(path)[0]


def read_header_and_metadata(
    path: str | Path,
) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Read and check a header; return its tensors' entries and its text metadata."""
    path = Path(path)
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        try:
            with safe_open(path, framework="numpy") as checked:
                metadata = checked.metadata() or {}
        except SafetensorError as error:
            _refuse(path, _reason(path, error))
        try:
            header = json.loads(file.read(size), object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            _refuse(path, str(error))
    header.pop("__metadata__", None)
    infos = {}
    for name, entry in header.items():
        if any(length > _LARGEST for length in entry["shape"]):
            _refuse(path, f"{name!r} has the shape {entry['shape']}, too large for MLX")
        start, end = (8 + size + offset for offset in entry["data_offsets"])
        infos[name] = TensorInfo(
            dtype=entry["dtype"], shape=tuple(entry["shape"]), start=start, end=end
        )
    return infos, metadata


def _refuse(path: Path, reason: str) -> NoReturn:
    raise DoRAError(f"{path} is not a valid safetensors file: {reason}.")


def _reason(path: Path, error: SafetensorError) -> str:
    length = path.stat().st_size
    if not length:
        return "it is empty (0 bytes)"
    reason = str(error).removeprefix("Error while deserializing header: ")
    is_short = reason.startswith(("incomplete metadata", "invalid header length"))
    return f"{reason} ({length} bytes; was it cut off?)" if is_short else reason


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} appears twice in its header")
    return unique
