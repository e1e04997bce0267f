"""Which attention keeps its scores: what the model calls, and what MLX can fuse.

On an Apple GPU, MLX 0.32.4 and newer compute the backward pass of attention in blocks,
without an array of all scores, under these conditions, which its library states as the
reasons for not doing so: the mask is causal or absent, not an array; there are no
attention sinks; and the width of a head is one of those that it has kernels for. The
kernels are named ``sdpa_vjp_odo_<dtype>_<width>`` in the installed ``mlx.metallib``.
Elsewhere the scores of a training exist as an array.
"""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn

from mlx_dora.train.metal import installed_library, kernel_names

BLOCK = 1024
"""Queries and keys in a block of the fused backward pass (``MLX_SDPA_VJP_BLOCK``)."""

# Widths of heads with a fused backward pass, by the first version of MLX that has them:
# the kernels' names in the wheel mlx-metal 0.32.4 of 2026-10-14 for macOS 15, read on
# 2026-11-28. For a Mac's own MLX, its own library is read.
_WIDTHS = {"0.32.4": (64, 72, 80, 96, 128, 192, 256, 512)}
# Needs a GPU with neural accelerators, says the library.
_NOT_EVERYWHERE = {512}
_KERNEL = r"sdpa_vjp_odo_\w+?_\d+"


@dataclass(frozen=True, kw_only=True)
class Device:
    """A device and the abilities of its MLX that decide the memory of attention.

    Args:
        kind: The backend of MLX.
        fused_widths: Widths of heads whose attention has a fused backward pass.
    """

    kind: Literal["cpu", "metal", "cuda"]
    fused_widths: frozenset[int] = frozenset()

    def fuses(self, call: "AttentionCall") -> bool:
        """Whether the backward pass of a call needs no array of scores."""
        return (
            call.query_width == call.value_width
            and call.query_width in self.fused_widths
            and not (call.has_array_mask or call.has_sinks)
        )


@dataclass(frozen=True, kw_only=True)
class AttentionCall:
    """A call of ``mx.fast.scaled_dot_product_attention``.

    Args:
        query_width: Width of a head's queries and keys.
        value_width: Width of a head's values.
        has_array_mask: Whether the mask is an array.
        has_sinks: Whether there are attention sinks.
    """

    query_width: int
    value_width: int
    has_array_mask: bool = False
    has_sinks: bool = False


def this_device() -> Device:
    """The device that MLX computes on, with the abilities of the installed MLX."""
    if mx.default_device() == mx.cpu:
        return Device(kind="cpu")
    if not mx.metal.is_available():
        return Device(kind="cuda")
    return metal_device(version("mlx"), installed_library())


def metal_device(mlx: str, library: Path | None = None) -> Device:
    """An Apple GPU with a version of MLX.

    Args:
        mlx: Version of MLX, which decides if there is no library.
        library: MLX's library of kernels, ``mlx.metallib``.
    """
    widths = frozenset[int]()
    if library is not None and library.is_file():
        names = kernel_names(_KERNEL, library)
        widths = frozenset(int(name.rpartition("_")[2]) for name in names)
    else:
        for first, known in _WIDTHS.items():
            if _parts(mlx) >= _parts(first):
                widths = frozenset(known)
    if int(os.environ.get("MLX_SDPA_VJP_FALLBACK") or 0):  # MLX's switch
        widths = frozenset()
    return Device(kind="metal", fused_widths=widths - _NOT_EVERYWHERE)


def _parts(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:3])


def attention_calls(model: nn.Module, length: int) -> tuple[AttentionCall, ...]:
    """The calls of attention in a forward pass, in order.

    The pass is only traced; MLX is lazy, so nothing is computed or allocated.

    Args:
        model: An mlx-lm model, which need not have weights.
        length: Tokens per row. With a window, a layer's mask depends on it.
    """
    calls: list[AttentionCall] = []
    with _intercepted(calls.append):
        model(mx.zeros((1, length), mx.int32))
    return tuple(calls)


@contextmanager
def _intercepted(noted: Callable[[AttentionCall], None]) -> Iterator[None]:
    plain = mx.fast.scaled_dot_product_attention

    def attention(
        q: mx.array,
        k: mx.array,
        v: mx.array,
        *,
        mask: Any = None,
        sinks: Any = None,
        **_: Any,
    ) -> mx.array:
        noted(
            AttentionCall(
                query_width=q.shape[-1],
                value_width=v.shape[-1],
                has_array_mask=isinstance(mask, mx.array),
                has_sinks=sinks is not None,
            )
        )
        return mx.zeros((*q.shape[:-1], v.shape[-1]), q.dtype)

    mx.fast.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        mx.fast.scaled_dot_product_attention = plain


def count_scored(
    calls: Sequence[AttentionCall], blocks: int, trained: int, device: Device
) -> int:
    """Number of the trained blocks whose attention keeps its scores.

    Args:
        calls: The calls of a forward pass, one per block. If their number differs, the
            model computes attention itself, and every block keeps its scores.
        blocks: Number of the model's blocks.
        trained: Number of blocks, the last ones, with a backward pass.
        device: Where the training runs.
    """
    if len(calls) != blocks:
        return trained
    return sum(not device.fuses(call) for call in calls[blocks - trained :])
