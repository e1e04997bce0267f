"""The header of a safetensors file, checked before any tensor is read.

MLX's own reader accepts overlapping tensors, holes, trailing bytes and duplicate keys;
the format's specification forbids all four.
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from mlx_dora.errors import DoRAError

MAX_HEADER_BYTES = 100_000_000
_TOO_LARGE = 2**63  # for a size or an offset

# Bits per element. The types below a byte must still end on one.
DTYPE_BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """What a header says of one tensor; `start` and `end` count from the file's start.

    The dtype is spelled as in the file: ``"BF16"``.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Size of the tensor's data."""
        return self.end - self.start


def read_header(path: str | Path) -> dict[str, TensorInfo]:
    """Read and check the header of a safetensors file, without its tensors.

    Args:
        path: A safetensors file.

    Returns:
        Each tensor's dtype, shape and place in the file, in the order of the header.

    Raises:
        DoRAError: If the file breaks a rule of the format; one line that names the
            file and, where one is to blame, the tensor.
    """
    return read_header_and_metadata(path)[0]


def read_header_and_metadata(
    path: str | Path,
) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Like `read_header`, with the texts that the file carries beside its tensors."""
    path = Path(path)
    text, data_start, file_bytes = _header_text(path)
    infos: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    for name, entry in _parse(path, text).items():
        if name == "__metadata__":
            _check_metadata(path, entry)
            metadata = dict(entry or {})
        else:
            infos[name] = _tensor_info(path, name, entry, data_start)
    _check_coverage(path, infos, data_start, file_bytes)
    return infos, metadata


def read_metadata(path: str | Path) -> dict[str, str]:
    """Return the free text that a safetensors file keeps beside its tensors."""
    path = Path(path)
    text, _, _ = _header_text(path)
    metadata = _parse(path, text).get("__metadata__")
    _check_metadata(path, metadata)
    return metadata or {}


def _refuse(path: Path, reason: str) -> NoReturn:
    raise DoRAError(f"{path} is not a valid safetensors file: {reason}.")


def _header_text(path: Path) -> tuple[bytes, int, int]:
    with path.open("rb") as file:
        file_bytes = os.fstat(file.fileno()).st_size
        if file_bytes == 0:
            _refuse(path, "it is empty (0 bytes)")
        start = file.read(8)
        if len(start) < 8:
            _refuse(path, f"it ends after {len(start)} bytes, before the header")
        size = int.from_bytes(start, "little")
        if size > MAX_HEADER_BYTES:
            _refuse(path, f"its header claims {size} bytes, over {MAX_HEADER_BYTES}")
        text = file.read(size)
    if len(text) < size:
        _refuse(path, f"its header claims {size} bytes, the file has {len(text)} more")
    return text, 8 + size, file_bytes


class _DuplicateKeyError(ValueError):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique: dict[str, Any] = {}
    for key, value in pairs:
        if key in unique:
            raise _DuplicateKeyError(f"the key {key!r} appears twice in its header")
        unique[key] = value
    return unique


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    if not text.startswith(b"{"):
        _refuse(path, "its header does not start with '{'")
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except _DuplicateKeyError as error:
        _refuse(path, str(error))
    except (ValueError, RecursionError) as error:
        _refuse(path, f"its header is not JSON ({' '.join(str(error).split())})")
    return header


def _check_metadata(path: Path, entry: Any) -> None:
    if entry is None:  # MLX writes null when there is none
        return
    if not isinstance(entry, dict) or not all(
        isinstance(value, str) for value in entry.values()
    ):
        _refuse(path, "__metadata__ must map names to text")


def _sizes(value: Any) -> tuple[int, ...] | None:
    """Return a list of sizes as a tuple, None for anything else."""
    if isinstance(value, list) and all(
        type(n) is int and 0 <= n < _TOO_LARGE for n in value
    ):
        return tuple(value)
    return None


def _short(number: int) -> str:
    """Digits, or for a number of more than a line of them its size."""
    bits = number.bit_length()
    return str(number) if bits < 200 else f"2^{bits - 1} or more"


def _tensor_info(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    if any("\ud800" <= character <= "\udfff" for character in name):
        _refuse(path, f"the name {name!r} holds half a surrogate pair")
    if not isinstance(entry, dict):
        _refuse(path, f"the header of {name!r} must be an object, got {entry!r:.60}")
    if set(entry) != {"dtype", "shape", "data_offsets"}:
        keys = ", ".join(sorted(entry)) or "nothing"
        _refuse(path, f"{name!r} needs dtype, shape and data_offsets, has {keys:.90}")
    bits = DTYPE_BITS.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if bits is None:
        _refuse(path, f"{name!r} has the unknown dtype {entry['dtype']!r:.60}")
    shape, offsets = _sizes(entry["shape"]), _sizes(entry["data_offsets"])
    if shape is None:
        _refuse(path, f"{name!r} has the bad shape {entry['shape']!r:.60}")
    if offsets is None or len(offsets) != 2 or offsets[0] > offsets[1]:
        _refuse(path, f"{name!r} has bad data_offsets {entry['data_offsets']!r:.60}")
    start, end = offsets
    if (end - start) * 8 != math.prod(shape) * bits:
        _refuse(
            path,
            f"{name!r} has dtype {entry['dtype']} and shape {shape}, which need "
            f"{_short(math.prod(shape) * bits // 8)} bytes, but spans {end - start}",
        )
    return TensorInfo(
        dtype=entry["dtype"],
        shape=shape,
        start=data_start + start,
        end=data_start + end,
    )


def _check_coverage(
    path: Path, infos: dict[str, TensorInfo], data_start: int, file_bytes: int
) -> None:
    """Tensors must tile the data: no overlap, no hole, nothing behind the last."""
    reached = data_start
    for name, info in sorted(
        infos.items(), key=lambda item: (item[1].start, item[1].end)
    ):
        if info.start < reached:
            _refuse(path, f"{name!r} overlaps the tensor before it")
        if info.start > reached:
            _refuse(path, f"{info.start - reached} unused bytes lie before {name!r}")
        reached = info.end
        if reached > file_bytes:
            _refuse(
                path,
                f"{name!r} ends at byte {reached}, but the file has {file_bytes} "
                "(was it cut off?)",
            )
    if reached < file_bytes:
        _refuse(path, f"{file_bytes - reached} bytes follow the last tensor")
