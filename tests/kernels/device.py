"""A pretended GPU: kernels computed by the specification, and time that tests set.

It takes MLX's place at `mx.fast.metal_kernel`, so that it depends on no kernel's text
or launch, only on the names of the buffers. A norm may be taken in one stage or in two.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_dora.kernels import choice, dispatch, kept, naive, trial
from mlx_dora.kernels.trial import Job

PREFIX = "mlx_dora_"


@dataclass
class Device:
    """What was built and launched, and what the clock says.

    Attributes:
        variants: Each kernel with its template and dtypes, as MLX would compile it.
        launches: Number of launches, by kernel.
        ratio: Time of a kernel divided by plain MLX's, by name of the op.
        timed: Names of the timed ops, in order.
        broken: Kernels that return wrong results.
        refused: Kernels that MLX cannot compile.
    """

    variants: set[tuple[Any, ...]] = field(default_factory=set)
    launches: dict[str, int] = field(default_factory=dict)
    ratio: Callable[[str], float] = lambda _: 0.5
    timed: list[str] = field(default_factory=list)
    broken: set[str] = field(default_factory=set)
    refused: set[str] = field(default_factory=set)

    def rounds(self, job: Job) -> tuple[list[float], list[float]]:
        """Stand in for `trial.rounds`."""
        before = dict(self.launches)
        mx.eval(job.kernel(*job.inputs(0)))
        name = next(k for k, n in self.launches.items() if n != before.get(k, 0))
        self.timed.append(name)
        return [1e-3 * self.ratio(name)] * 7, [1e-3] * 7

    def metal_kernel(self, *, name: str, **_: Any) -> Callable[..., list[mx.array]]:
        """Stand in for `mx.fast.metal_kernel`."""
        op = name.removeprefix(PREFIX)

        def call(
            *,
            inputs: list[mx.array],
            template: list[tuple[str, Any]],
            output_shapes: list[tuple[int, ...]],
            output_dtypes: list[mx.Dtype],
            **_: Any,
        ) -> list[mx.array]:
            if op in self.refused:
                raise RuntimeError("[metal] no such function\nlog of the compiler")
            dtypes = tuple(array.dtype for array in inputs)
            self.variants.add((op, tuple(template), dtypes))
            self.launches[op] = self.launches.get(op, 0) + 1
            buffers = dict(zip(dispatch.KERNELS[op].inputs, inputs, strict=True))
            facts = dict(template)
            results = _KERNELS[op](buffers, facts, output_shapes)
            if op in self.broken:
                results = [2 * result for result in results]
            return [
                result.reshape(shape).astype(dtype)
                for result, shape, dtype in zip(
                    results, output_shapes, output_dtypes, strict=True
                )
            ]

        return call


Buffers = dict[str, mx.array]
Shapes = list[tuple[int, ...]]


def _rows(b: Buffers, _: dict[str, Any], __: Shapes) -> list[mx.array]:
    return list(naive.normalize_rows(b["weight"], b["magnitude"]))


def _update(b: Buffers) -> tuple[mx.array, mx.array, float]:
    """A, B and s, whether or not the call has multiplied s into B."""
    lora_a = b["lora_a"] if "lora_a" in b else b["down"].T
    if "up" in b:
        return lora_a, b["up"], 1.0
    return lora_a, b["lora_b"], float(b["scale"][0])


def _norm(b: Buffers, facts: dict[str, Any], shapes: Shapes) -> list[mx.array]:
    norm = naive.adapted_norm(b["weight"], *_update(b))
    if len(shapes[0]) == 1:
        return [norm]
    whole = mx.square(norm)[None, None]  # a first stage: one part holds the sum
    sums, strips, _ = shapes[0]
    both = mx.concatenate([whole, mx.zeros_like(whole)])[:sums]
    return [mx.pad(both, [(0, 0), (0, strips - 1), (0, 0)])]


def _total(b: Buffers, _: dict[str, Any], __: Shapes) -> list[mx.array]:
    return [mx.sqrt(b["partial"].sum(axis=(0, 1)))]


def _packed(b: Buffers, facts: dict[str, Any], shapes: Shapes) -> list[mx.array]:
    groups = b["scales"].shape[1]
    columns = b["lora_a"].shape[0]
    bits = b["weight"].shape[1] * 32 // columns
    weight = mx.dequantize(
        b["weight"], b["scales"], b["biases"], group_size=columns // groups, bits=bits
    )
    return _norm({**b, "weight": weight}, facts, shapes)


def _fused(b: Buffers, _: dict[str, Any], __: Shapes) -> list[mx.array]:
    return [naive.fused_weight(b["weight"], *_update(b), b["magnitude"])]


def _scale(b: Buffers, facts: dict[str, Any], _: Shapes) -> list[mx.array]:
    offset = b["offset"] if facts["HAS_OFFSET"] else None
    return [naive.rescale(b["y"], b["h"], b["up"], b["gain"], offset)]


def _backward(b: Buffers, facts: dict[str, Any], shapes: Shapes) -> list[mx.array]:
    dy, out = b["dy"].astype(mx.float32), b["o"].astype(mx.float32)
    unscaled = dy * (out - b["offset"] if facts["HAS_OFFSET"] else out)
    sums = [unscaled.sum(axis=0)] + [dy.sum(axis=0)] * facts["HAS_OFFSET"]
    chunks = shapes[1][1]  # the first holds the whole sum
    partial = mx.stack(sums)[:, None]
    partial = mx.pad(partial, [(0, 0), (0, chunks - 1), (0, 0)])
    return [b["gain"] * dy, partial]


def _columns(b: Buffers, _: dict[str, Any], __: Shapes) -> list[mx.array]:
    sums = b["partial"].sum(axis=1)
    safe = mx.where(b["gain"] != 0, b["gain"], 1.0)
    first = mx.where(b["gain"] != 0, sums[0] / safe, 0.0)
    return [mx.concatenate([first[None], sums[1:]])]


_KERNELS = {
    "normalize_rows": _rows,
    "adapted_norm": _norm,
    "adapted_norm_packed": _packed,
    "adapted_norm_total": _total,
    "fused_weight": _fused,
    "dora_scale": _scale,
    "dora_scale_backward": _backward,
    "dora_scale_columns": _columns,
}


def forget() -> None:
    """Forget what the process knows of its device, as a new process does."""
    choice.forget()
    dispatch.backend_of.cache_clear()
    dispatch.build.cache_clear()
    kept._WARNED.clear()
    trial._REPORTED.clear()


@contextmanager
def pretended(cache: Path, patch: pytest.MonkeyPatch) -> Iterator[Device]:
    """Pretend that MLX's default device is a GPU of Apple, with an empty cache."""
    device = Device()
    patch.setattr(dispatch, "device_backend", lambda: "metal")
    patch.setattr(choice, "device_backend", lambda: "metal")
    patch.setattr(trial, "device_backend", lambda: "metal")
    patch.setattr(trial, "rounds", device.rounds)
    patch.setattr(mx.fast, "metal_kernel", device.metal_kernel)
    patch.setattr("mlx_dora.kernels.kept.cache_folder", lambda: cache)
    patch.delenv("MLX_DORA_KERNELS", raising=False)
    forget()
    yield device
    forget()
