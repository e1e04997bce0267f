"""Bytes that each kernel moves, counted access by access.

``python -m tests.metal_host.traffic`` prints the table of `metal/README.md`.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from mlx_dora.kernels import plans as table
from mlx_dora.kernels.plans import KERNELS
from tests.metal_host.build import Builder
from tests.metal_host.execute import COUNT, Traffic
from tests.metal_host.host import Host, call


@dataclass(frozen=True)
class Counted:
    """Traffic of one launch, by the name of the kernel's input or output."""

    kernel: str
    shape: str
    buffers: dict[str, Traffic]
    sizes: dict[str, int]

    def reads(self, name: str) -> float:
        """How many times the whole buffer was read."""
        return self.buffers[name].read / self.sizes[name]

    def writes(self, name: str) -> float:
        """How many times the whole buffer was written."""
        return self.buffers[name].written / self.sizes[name]

    def is_whole(self, name: str) -> bool:
        """Whether every byte took part."""
        traffic = self.buffers[name]
        return self.sizes[name] in (traffic.read_once, traffic.written_once)


def count(
    host: Host, kernel: str, launch: table.Launch, inputs: list[mx.array], shape: str
) -> Counted:
    """Run one launch and count."""
    with host.running("check", flags=COUNT):
        call(kernel, launch, inputs)
    assert host.findings == {}, host.findings
    ((record, outcome),) = host.outcomes
    traffic = iter(outcome.traffic)
    buffers, sizes = {}, {}
    spec = KERNELS[kernel]
    for name, (dims, dtype), extras in zip(
        spec.inputs, record.inputs, record.extras, strict=True
    ):
        buffers[name] = next(traffic)
        sizes[name] = _bytes(dims, dtype)
        for _ in range(sum(extras)):  # shape, strides, ndim: a few bytes
            next(traffic)
    for name, (dims, dtype) in zip(spec.outputs, record.outputs, strict=True):
        buffers[name] = next(traffic)
        sizes[name] = _bytes(dims, dtype)
    return Counted(kernel, shape, buffers, sizes)


def _bytes(shape: tuple[int, ...], dtype: mx.Dtype) -> int:
    size = dtype.size
    for n in shape:
        size *= n
    return size


def normalize_rows(host: Host, out: int, width: int) -> Counted:
    """Counted on a float16 weight."""
    launch = table.plan_normalize_rows((out, width), mx.float16)
    inputs = [_half(out, width), mx.ones((out,))]
    return count(host, "normalize_rows", launch, inputs, f"{out}x{width}")


def adapted_norm(host: Host, out: int, width: int, r: int) -> Counted:
    """Counted on a float16 weight."""
    launch = table.plan_adapted_norm((out, width), r, mx.float16)
    inputs = [_half(out, width), *_low_rank(out, width, r)]
    return count(host, "adapted_norm", launch, inputs, f"{out}x{width} r{r}")


def adapted_norm_packed(
    host: Host, out: int, width: int, r: int, bits: int = 4, group: int = 64
) -> Counted:
    """Counted on a weight in groups of 64."""
    launch = table.plan_adapted_norm_packed((out, width), r, bits, group)
    packed = [
        mx.zeros((out, width * bits // 32), dtype=mx.uint32),
        _half(out, width // group),
        _half(out, width // group),
    ]
    inputs = [*packed, *_low_rank(out, width, r)]
    shape = f"{out}x{width} r{r} {bits}-bit"
    return count(host, "adapted_norm_packed", launch, inputs, shape)


def fused_weight(host: Host, out: int, width: int, r: int) -> Counted:
    """Counted on a float16 weight."""
    launch = table.plan_fused_weight((out, width), r, mx.float16)
    lora_a, up = _low_rank(out, width, r)
    inputs = [_half(out, width), lora_a.T, up, mx.ones((out,))]
    return count(host, "fused_weight", launch, inputs, f"{out}x{width} r{r}")


def dora_scale(host: Host, tokens: int, out: int, r: int) -> Counted:
    """Counted in float16 with an offset."""
    launch = table.plan_dora_scale((tokens, out), r, mx.float16, True)
    ones = mx.ones((out,))
    up = _low_rank(out, 1, r)[1]
    inputs = [_half(tokens, out), _half(tokens, r), up, ones, ones]
    return count(host, "dora_scale", launch, inputs, f"{tokens}x{out} r{r}")


def dora_scale_backward(host: Host, tokens: int, out: int) -> Counted:
    """First stage, counted in float16 with an offset."""
    launch = table.plan_dora_scale_backward((tokens, out), mx.float16, True)
    ones = mx.ones((out,))
    inputs = [_half(tokens, out), _half(tokens, out), ones, ones]
    shape = f"{tokens}x{out}"
    return count(host, "dora_scale_backward", launch, inputs, shape)


def _half(*shape: int) -> mx.array:
    return mx.ones(shape, dtype=mx.float16)


def _low_rank(out: int, width: int, r: int) -> list[mx.array]:
    return [mx.ones((width, r)), mx.ones((r, out))]


# The shapes that the design is judged at: 4096 x 4096, 2048 tokens x 4096, ranks 8 and
# 64; and rows past the registers.
LAUNCHES: tuple[Callable[[Host], Counted], ...] = (
    lambda h: normalize_rows(h, 4096, 4096),
    lambda h: normalize_rows(h, 512, 16512),
    *(lambda h, r=r: adapted_norm(h, 4096, 4096, r) for r in (8, 64)),
    *(lambda h, r=r: adapted_norm_packed(h, 4096, 4096, r) for r in (8, 64)),
    *(lambda h, r=r: fused_weight(h, 4096, 4096, r) for r in (8, 64)),
    lambda h: fused_weight(h, 64, 16512, 8),
    *(lambda h, r=r: dora_scale(h, 2048, 4096, r) for r in (8, 64)),
    lambda h: dora_scale_backward(h, 2048, 4096),
)


def main() -> None:
    """Print the table."""
    print("| kernel | shape | buffer | bytes | read | written |")  # noqa: T201 - a table
    print("| --- | --- | --- | ---: | ---: | ---: |")  # noqa: T201
    with tempfile.TemporaryDirectory() as folder:
        host = Host(Builder(Path(folder)))
        for launch in LAUNCHES:
            counted = launch(host)
            for name, size in counted.sizes.items():
                reads, writes = counted.reads(name), counted.writes(name)
                print(  # noqa: T201
                    f"| {counted.kernel} | {counted.shape} | {name} | {size} "
                    f"| {reads:.3g} | {writes:.3g} |"
                )


if __name__ == "__main__":
    main()
