"""What training on an Apple GPU depends on: MLX's own kernels, and mlx-lm's."""

import mmap
import re
from functools import cache
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from mlx_dora.errors import DoRAError

# Model files of mlx-lm 0.32.2 whose training on Metal calls a kernel that has no
# gradient, and the kernel. `tests/compat/gpu_branches.py` finds them by running every
# model; a test compares.
WITHOUT_GRADIENT = {
    "bitnet": "bitlinear_matmul",
    "deepseek_v41": "deepseek_v41_sinkhorn",
    "muse_spark": "qk_norm and six more",
    "rwkv7": "wkv7_kernel",
}


def trains_on_metal() -> bool:
    """Whether MLX computes on an Apple GPU."""
    return mx.default_device() == mx.gpu and mx.metal.is_available()


def check_gradients(model: nn.Module, *, on_metal: bool | None = None) -> None:
    """Refuse a model that cannot be differentiated on an Apple GPU.

    Args:
        model: The model to be trained.
        on_metal: Whether it is trained there; default: `trains_on_metal`.

    Raises:
        DoRAError: If mlx-lm's model calls a kernel without a gradient there.
    """
    home, _, name = type(model).__module__.rpartition(".")
    kernel = WITHOUT_GRADIENT.get(name) if home == "mlx_lm.models" else None
    if kernel is None or not (trains_on_metal() if on_metal is None else on_metal):
        return
    raise DoRAError(
        f"{name} cannot be trained on an Apple GPU: mlx-lm computes it there with "
        f"Metal kernels that have no gradient ({kernel}). Train on the CPU: call "
        "mx.set_default_device(mx.cpu) before finetune."
    )


@cache
def kernel_names(pattern: str, library: Path | None = None) -> frozenset[str]:
    """Names of the kernels in MLX's library that match a pattern.

    Args:
        pattern: Regular expression of a whole name, of ASCII letters.
        library: ``mlx.metallib``; default: the installed one.

    Returns:
        The names; none if there is no library.
    """
    library = installed_library() if library is None else library
    if not library.is_file():
        return frozenset()
    whole = re.compile(rb"\0(" + pattern.encode() + rb")\0")
    with (
        library.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
    ):
        return frozenset(match[1].decode() for match in whole.finditer(content))


def installed_library() -> Path:
    """Path of MLX's library of Metal kernels; it exists on a Mac."""
    return Path(mx.__file__).parent / "lib" / "mlx.metallib"
