"""A model folder as mlx-lm is to read it: checked, and without what it misreads."""

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_dora.errors import DoRAError
from mlx_dora.io.gate import check_dtypes, holds_float64, read_tensors
from mlx_dora.io.header import TensorInfo, read_header
from mlx_dora.io.weight_files import weight_files, without_strays


@contextlib.contextmanager
def model_view(folder: Path) -> Iterator[Path]:
    """The folder from which mlx-lm is to load a model, while this lasts.

    Weights beside those of the index are not in it, float64 is read as float32 (which
    `mx.load` refuses), and float8 that mlx-lm cannot unpack is refused by name.
    """
    infos = headers_of(folder)
    utils: Any = importlib.import_module("mlx_lm.utils")
    own = utils.mx
    if holds_float64(infos):
        utils.mx = _RoundingReader()
    try:
        with without_strays(folder) as seen:
            yield seen
    except ValueError as error:
        if float8 := _float8(infos):
            raise DoRAError(_dequantise_first(folder, float8)) from error
        raise
    finally:
        utils.mx = own


def gated_loader(own: Callable[..., Any]) -> Callable[..., Any]:
    """mlx-lm's `load_model` behind the same gate as ours."""
    if getattr(own, "is_gated", False):  # ours is in place already
        return own

    @functools.wraps(own)
    def load_model(model_path: str | Path, *args: Any, **kwargs: Any) -> Any:
        folder = Path(model_path)
        check_dtypes(folder, headers_of(folder), host_unpacks=True)
        with model_view(folder) as seen:
            loaded = own(seen, *args, **kwargs)
        check_loaded(folder, loaded[0])
        return loaded

    load_model.is_gated = True  # pyright: ignore[reportAttributeAccessIssue] - a mark
    return load_model


class _RoundingReader:
    """`mlx.core`, but for `load`, which reads float64 too."""

    def load(self, path: str) -> dict[str, mx.array]:
        """What `mx.load` returns for a file that is not lazily read."""
        return read_tensors(path)

    def __getattr__(self, name: str) -> Any:
        return getattr(mx, name)


def headers_of(folder: Path) -> dict[str, TensorInfo]:
    """The checked headers of the weights that a model folder is loaded from."""
    return {
        name: info
        for shard in weight_files(folder)
        for name, info in read_header(shard).items()
    }


def _float8(infos: Mapping[str, TensorInfo]) -> list[str]:
    return [name for name, info in infos.items() if info.dtype.startswith("F8")]


def _dequantise_first(folder: Path, names: list[str]) -> str:
    return (
        f"{folder}: {names[0]} and {len(names) - 1} more are float8, which mlx-lm does "
        "not dequantise for this architecture: dequantise the model to bfloat16, "
        "float16 or float32 first."
    )


def check_loaded(folder: Path, model: nn.Module) -> None:
    """Refuse a model in which float8 is left as the integers that MLX reads."""
    if not (float8 := _float8(headers_of(folder))):
        return
    for module in model.modules():
        weight = module.get("weight")
        is_packed = "scales" in module or "weight_scale" in module
        if isinstance(weight, mx.array) and weight.dtype == mx.uint8 and not is_packed:
            raise DoRAError(_dequantise_first(folder, float8))
