"""Accepts or refuses the tensors of a safetensors file by dtype, before reading any.

float32, float16, bfloat16 and MLX's packed weights (32-bit words with scales) are
accepted unchanged. float64, which MLX cannot read, is rounded to float32 with a
warning. Integers are accepted where they are not weights (positions, counters).
Everything else is refused by name: MLX would read float8 as 8-bit integers and compute
with them.
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
"""Dtypes accepted for weights; F64 is rounded to float32."""

# Last parts of the names of weights; every other tensor may hold integers.
_WEIGHTS = ("weight", "scales", "biases", "lora_a", "lora_b", "m")
_LISTED = 3
# NumPy's dtype for each stored dtype.
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
    """Refuse tensors whose dtype cannot be used in computation; warn about float64.

    Args:
        where: The file or folder, for messages.
        infos: The header entries of all its tensors, by name.
        all_weights: Treat every tensor as a weight, as in an adapter.
        host_unpacks: Accept float8 with scales, which mlx-lm converts to floats for the
            architectures published in float8. Check the model again after loading.

    Raises:
        DoRAError: If a dtype is refused; names the tensors, the dtype and the remedy.
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
    """Read a safetensors file after checking its header and dtypes.

    Args:
        path: The file.
        all_weights: Treat every tensor as a weight, as in an adapter.
        infos: The file's header entries, if they were read and checked before.

    Returns:
        The arrays by name; lazy unless the file holds float64.

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
        return {name: read_tensor(path, name, info) for name, info in infos.items()}
    with foreign(path):
        loaded = mx.load(str(path))
    assert isinstance(loaded, dict)
    return loaded


def holds_float64(infos: Mapping[str, TensorInfo]) -> bool:
    """Whether a file holds float64, which prevents MLX from reading any of it."""
    return any(info.dtype == "F64" for info in infos.values())


def read_tensor(path: str | Path, name: str, info: TensorInfo) -> mx.array:
    """Read one tensor with NumPy; float64 is rounded to float32.

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
    """Return a float32 copy of float64 values.

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
    """Return why a tensor without plain floats is refused; None if it is accepted."""
    dtype = infos[name].dtype
    if dtype.startswith("F8"):
        scale = next((s for s in _scales_of(name) if s in infos), None)
        how = f" with {scale}" if scale else ""
        return (
            f"float8 ({dtype}), which is not supported; dequantize the model to "
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
    """Whether integers are packed weights of MLX or BitNet, or their scales."""
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
    """Whether a float8 tensor that MLX reads has a scale beside it, or is a scale."""
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
    # Cached, so that a folder checked several times is reported once.
    logger.warning(
        "%s: float64 is rounded to float32 in %s.", where, _some(list(names))
    )
