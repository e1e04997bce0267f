"""Prepares a model folder for mlx-lm: checked, and without files it would misread."""

import contextlib
import functools
import importlib
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_dora.adapters.origins import Origins
from mlx_dora.errors import DoRAError
from mlx_dora.io.gate import check_dtypes, holds_float64, read_tensors
from mlx_dora.io.header import TensorInfo, read_header
from mlx_dora.io.weight_files import weight_files, without_strays

_swap = threading.RLock()  # held while mlx-lm's name for `mlx.core` is replaced


@contextlib.contextmanager
def model_view(
    folder: Path, infos: Mapping[str, TensorInfo], origins: Origins | None = None
) -> Iterator[Path]:
    """Yield the folder from which mlx-lm should load a model.

    It excludes weights that the index does not list. During the block, float64, which
    `mx.load` refuses, is read as float32. float8 that mlx-lm cannot unpack is refused
    by name.

    Args:
        folder: The model's folder.
        infos: `headers_of` the folder.
        origins: Takes a note of each array that is read lazily.
    """
    is_rounded = holds_float64(infos)
    with contextlib.ExitStack() as stack:
        if is_rounded or origins is not None:
            stack.enter_context(_swap)
            utils: Any = importlib.import_module("mlx_lm.utils")
            stack.callback(setattr, utils, "mx", utils.mx)
            utils.mx = _Reader(utils.mx, is_rounded, origins)
        seen = stack.enter_context(without_strays(folder))
        try:
            yield seen
        except ValueError as error:
            if float8 := _float8(infos):
                raise DoRAError(_dequantize_first(folder, float8)) from error
            raise


def gated_loader(own: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap mlx-lm's `load_model` with the checks of our loader."""
    if getattr(own, "is_gated", False):  # wrapped already
        return own

    @functools.wraps(own)
    def load_model(model_path: str | Path, *args: Any, **kwargs: Any) -> Any:
        folder = Path(model_path)
        infos = headers_of(folder)
        check_dtypes(folder, infos, host_unpacks=True)
        with model_view(folder, infos) as seen:
            loaded = own(seen, *args, **kwargs)
        check_loaded(folder, infos, loaded[0])
        return loaded

    load_model.is_gated = True  # pyright: ignore[reportAttributeAccessIssue] - a mark
    return load_model


class _Reader:
    """Stands in for `mlx.core`, with a `load` that rounds float64 or notes origins."""

    def __init__(self, own: Any, is_rounded: bool, origins: Origins | None) -> None:
        self._own, self._is_rounded, self._origins = own, is_rounded, origins

    def load(self, path: str) -> dict[str, mx.array]:
        """Read a file like `mx.load`; not lazily, if the model holds float64."""
        if self._is_rounded:
            return read_tensors(path)
        loaded = self._own.load(path)
        if self._origins is not None:
            self._origins.add(path, loaded)
        return loaded

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)


def headers_of(folder: Path) -> dict[str, TensorInfo]:
    """Return the checked headers of a model folder's weight files."""
    return {
        name: info
        for shard in weight_files(folder)
        for name, info in read_header(shard).items()
    }


def _float8(infos: Mapping[str, TensorInfo]) -> list[str]:
    return [name for name, info in infos.items() if info.dtype.startswith("F8")]


def _dequantize_first(folder: Path, names: list[str]) -> str:
    return (
        f"{folder}: {names[0]} and {len(names) - 1} more are float8, which mlx-lm does "
        "not dequantize for this architecture: dequantize the model to bfloat16, "
        "float16 or float32 first."
    )


def check_loaded(
    folder: Path, infos: Mapping[str, TensorInfo], model: nn.Module
) -> None:
    """Refuse a model in which float8 remains as the integers that MLX reads."""
    if not (float8 := _float8(infos)):
        return
    for module in model.modules():
        weight = module.get("weight")
        is_packed = "scales" in module or "weight_scale" in module
        if isinstance(weight, mx.array) and weight.dtype == mx.uint8 and not is_packed:
            raise DoRAError(_dequantize_first(folder, float8))
