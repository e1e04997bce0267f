"""What MLX would hand to Apple's compiler and queue, taken from MLX itself on Linux."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

# Bound before any test puts a stand-in in its place.
_metal_kernel = mx.fast.metal_kernel


@dataclass(frozen=True)
class Record:
    """One dispatch of a custom kernel.

    Attributes:
        name: MLX's name of the instantiated kernel.
        text: The full source, less the preamble that MLX puts before every kernel.
        grid: Threads along each axis.
        threadgroup: Threads of a threadgroup along each axis.
        extras: For each input, whether its shape, strides and ndim are passed too.
        inputs: Shape and dtype of each.
        outputs: Shape and dtype of each.
    """

    name: str
    text: str
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    extras: tuple[tuple[bool, bool, bool], ...]
    inputs: tuple[tuple[tuple[int, ...], mx.Dtype], ...]
    outputs: tuple[tuple[tuple[int, ...], mx.Dtype], ...]

    @property
    def key(self) -> str:
        """Names the text: equal texts are compiled once."""
        return "k" + hashlib.sha256(self.text.encode()).hexdigest()[:16]


def trace(function: Callable[..., Any], *arrays: mx.array) -> list[Record]:
    """The custom kernels that ``function(*arrays)`` would dispatch, in order."""
    records = []

    def see(event: dict[str, Any]) -> None:
        if event.get("type") != "primitive" or event["name"] != "CustomKernel":
            return
        a = event["arguments"]
        assert a[9], "the host passes row-contiguous inputs only"
        records.append(
            Record(
                name=a[0],
                text=a[1],
                grid=tuple(a[2:5]),
                threadgroup=tuple(a[5:8]),
                extras=tuple(tuple(e) for e in a[8]),
                inputs=tuple((tuple(s), d) for _, s, d in event["inputs"]),
                outputs=tuple((tuple(s), d) for _, s, d in event["outputs"]),
            )
        )

    mx.export_function(see, function, *arrays)
    return records


@dataclass(frozen=True)
class Dispatch:
    """A record with the values of its inputs."""

    record: Record
    inputs: tuple[mx.array, ...]
    init_value: float | None


def stand_in(run: Callable[[Dispatch], list[mx.array]]) -> Callable[..., Any]:
    """A replacement for `mx.fast.metal_kernel` whose kernels are run by `run`."""

    def metal_kernel(**spec: Any) -> Callable[..., list[mx.array]]:
        real: Callable[..., list[mx.array]] = _metal_kernel(**spec)  # pyright: ignore[reportAssignmentType] - the stubs say object

        def call(*, inputs: list[Any], **launch: Any) -> list[mx.array]:
            arrays = [x if isinstance(x, mx.array) else mx.array(x) for x in inputs]
            fresh = [mx.zeros(x.shape, dtype=x.dtype) for x in arrays]
            (record,) = trace(lambda *a: real(inputs=list(a), **launch), *fresh)
            return run(Dispatch(record, tuple(arrays), launch.get("init_value")))

        return call

    return metal_kernel
