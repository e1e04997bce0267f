"""Which tensors of a safetensors file may enter, decided by dtype before any is read.

float32, float16 and bfloat16 enter as they are, and so does what MLX packs: 32-bit
words with their scales. float64, which MLX cannot read, is rounded to float32 with a
note. Integers enter where they are no weight (positions, counters). Everything else is
refused by name: MLX reads float8 as 8-bit integers, which would be computed with.
"""

import logging
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_dora.errors import DoRAError
from mlx_dora.io.foreign import foreign
from mlx_dora.io.header import TensorInfo, read_header

FLOATS = ("F64", "F32", "F16", "BF16")
"""Dtypes of weights; F64 is rounded to float32."""

# The last part of a name that holds a weight; every other tensor may be an integer.
_WEIGHTS = ("weight", "scales", "biases", "lora_a", "lora_b", "m")
_LISTED = 3
# How NumPy reads what is stored.
_NUMPY = {
    "BOOL": "?",
    "U8": "<u1",
    "I8": "<i1",
    "U16": "<u2",
    "I16": "<i2",
    "F16": "<f2",
    "BF16": "<u2",
    "U32": "<u4",
    "I32": "<i4",
    "F32": "<f4",
    "U64": "<u8",
    "I64": "<i8",
    "F64": "<f8",
}

logger = logging.getLogger(__name__)


def check_dtypes(
    where: str | Path,
    infos: Mapping[str, TensorInfo],
    *,
    all_weights: bool = False,
    host_unpacks: bool = False,
) -> None:
    """Refuse tensors whose dtype cannot be computed with, and note float64.

    Args:
        where: The file or folder, for messages.
        infos: The headers of all its tensors.
        all_weights: Take every tensor for a weight, as in an adapter.
        host_unpacks: Let float8 with scales pass: mlx-lm turns it into floats for the
            architectures that are published so. What it leaves must be looked at again.

    Raises:
        DoRAError: One line that names the tensors, their dtype and what to do.
    """
    refused: dict[str, list[str]] = {}
    for name, info in infos.items():
        if info.dtype in FLOATS or (host_unpacks and _has_scale(name, infos)):
            continue
        reason = _refusal(name, infos, all_weights)
        if reason is not None:
            refused.setdefault(reason, []).append(name)
    if refused:
        problems = [f"{_some(names)}: {reason}" for reason, names in refused.items()]
        raise DoRAError(f"{where}: {'; '.join(problems)}.")
    rounded = tuple(name for name, info in infos.items() if info.dtype == "F64")
    if rounded:
        _note_float64(str(where), rounded)


def read_tensors(
    path: str | Path,
    *,
    all_weights: bool = False,
    infos: Mapping[str, TensorInfo] | None = None,
) -> dict[str, mx.array]:
    """Read a safetensors file whose header and dtypes are checked first.

    Args:
        path: The file.
        all_weights: See `check_dtypes`.
        infos: Its header, where it has been read and its dtypes checked already.

    Returns:
        Name to array; lazy, except where the file holds float64.

    Raises:
        DoRAError: If the file breaks a rule of the format, or a dtype is refused.
    """
    path = Path(path)
    if infos is None:
        infos = read_header(path)
        check_dtypes(path, infos, all_weights=all_weights)
    if not infos:
        return {}
    if holds_float64(infos):
        return {name: read_one(path, name, info) for name, info in infos.items()}
    with foreign(path):
        loaded = mx.load(str(path))
    assert isinstance(loaded, dict)
    return loaded


def holds_float64(infos: Mapping[str, TensorInfo]) -> bool:
    """Whether a file holds a tensor that keeps MLX from reading any of it."""
    return any(info.dtype == "F64" for info in infos.values())


def read_one(path: str | Path, name: str, info: TensorInfo) -> mx.array:
    """Read one tensor by NumPy; float64 becomes float32.

    Raises:
        DoRAError: If a float64 value is too large for float32.
    """
    kind = np.dtype(_NUMPY[info.dtype])
    count = info.nbytes // kind.itemsize
    values = np.fromfile(path, kind, count, offset=info.start).reshape(info.shape)
    if info.dtype == "F64":
        values = rounded(values, f"{path}: {name}")
    array = mx.array(values)
    return array.view(mx.bfloat16) if info.dtype == "BF16" else array


def rounded(values: np.ndarray, name: str) -> np.ndarray:
    """float64 as float32, in memory of its own.

    Raises:
        DoRAError: If a finite value is too large for float32.
    """
    with np.errstate(over="ignore"):
        single = values.astype(np.float32)
    if np.isinf(single).any() and not np.array_equal(
        np.isinf(single), np.isinf(values)
    ):
        raise DoRAError(f"{name} holds float64 values too large for float32.")
    return single


def _refusal(
    name: str, infos: Mapping[str, TensorInfo], all_weights: bool
) -> str | None:
    """Why a tensor that holds no plain floats cannot enter; None if it can."""
    dtype = infos[name].dtype
    if dtype.startswith("F8"):
        scale = next((s for s in _scales_of(name) if s in infos), None)
        how = f" with {scale}" if scale else ""
        return (
            f"float8 ({dtype}), which is not computed with; dequantise the model to "
            f"bfloat16, float16 or float32 first{how}"
        )
    if dtype not in _NUMPY:
        kind = "complex numbers" if dtype == "C64" else "a dtype that MLX cannot read"
        return f"{kind} ({dtype}); float32, float16 or bfloat16 is expected"
    is_weight = all_weights or name.rpartition(".")[2] in _WEIGHTS
    if not is_weight or (not all_weights and _is_packed(name, infos)):
        return None
    return (
        f"integers ({dtype}) where a weight is expected: float32, float16, "
        "bfloat16, or MLX's packed words (U32) with scales"
    )


def _is_packed(name: str, infos: Mapping[str, TensorInfo]) -> bool:
    """Whether integers are packed weights of MLX (or BitNet's), or their scales."""
    stem, _, leaf = name.rpartition(".")
    dtype = infos[name].dtype
    if leaf == "weight":
        if dtype == "U8":
            return f"{stem}.weight_scale" in infos
        return dtype == "U32" and f"{stem}.scales" in infos
    weight = infos.get(f"{stem}.weight")
    is_scale = leaf == "scales" and dtype == "U8"
    return is_scale and weight is not None and weight.dtype == "U32"


def _has_scale(name: str, infos: Mapping[str, TensorInfo]) -> bool:
    """Whether float8 that MLX reads has a scale beside it, or is one."""
    if infos[name].dtype not in ("F8_E4M3", "F8_E8M0"):
        return False
    is_scale = "scale" in name.rpartition(".")[2]
    return is_scale or any(scale in infos for scale in _scales_of(name))


def _scales_of(name: str) -> tuple[str, ...]:
    stem = name.rpartition(".")[0]
    return f"{name}_scale_inv", f"{name}_scale", f"{stem}.scale", f"{stem}.scales"


def _some(names: list[str]) -> str:
    more = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {more} more" if more > 0 else "")


@lru_cache(maxsize=64)
def _note_float64(where: str, names: tuple[str, ...]) -> None:
    # Once for a folder: a command may look at it several times.
    logger.warning(
        "%s: float64 is rounded to float32 in %s.", where, _some(list(names))
    )
