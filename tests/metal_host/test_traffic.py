"""Bytes moved, counted access by access, against the formulas of the documentation."""

import mlx.core as mx
import pytest

from mlx_dora.doctor import traffic as formulas
from tests.metal_host import traffic
from tests.metal_host.host import Host

HALF = mx.float16
LARGE = {"weight", "rescaled", "fused", "y", "composed", "dy", "o", "scaled"}
REREAD = {"lora_a", "down", "up", "h"}


def check(
    counted: traffic.Counted,
    formula: formulas.Traffic,
    passes: int = 1,
    lanes_of_up: int = 1,
) -> None:
    """Large operands exactly once (`passes` times), rereads as the formula says.

    `lanes_of_up` lanes of a simdgroup load the same value of `up`, which is one load.
    """
    large = LARGE & set(counted.buffers)
    for name in large:
        moved = counted.reads(name) + counted.writes(name)
        once = {"weight": passes}.get(name, 1)
        assert moved == once, f"{counted.kernel} moves {name} {moved} times"
        assert counted.is_whole(name), f"{counted.kernel} leaves out part of {name}"
    moved = sum(counted.buffers[n].read + counted.buffers[n].written for n in large)
    assert moved <= formula.large
    reread = REREAD & set(counted.buffers)
    read = {n: counted.buffers[n].read for n in reread}
    if "up" in read:
        read["up"] //= lanes_of_up
    assert sum(read.values()) == formula.rereads
    assert sum(counted.sizes[n] for n in reread) == formula.cached
    assert formula.cached <= 8 << 20  # the smallest last-level cache: M1's 8 MB


@pytest.mark.parametrize(
    "out, width, passes", [(64, 4096, 1), (4, 8192, 1), (4, 16512, 2)]
)
def test_normalize_rows(host: Host, out: int, width: int, passes: int):
    counted = traffic.normalize_rows(host, out, width)
    formula = formulas.normalize_rows_traffic((out, width), HALF)
    check(counted, formula, passes)
    assert (
        formula.large
        == sum(counted.sizes[n] for n in LARGE & set(counted.sizes))
        + (passes - 1) * counted.sizes["weight"]
    )


@pytest.mark.parametrize("out, width", [(2048, 128), (64, 1024), (528, 1024)])
@pytest.mark.parametrize("r", [8, 64])
def test_adapted_norm(host: Host, out: int, width: int, r: int):
    counted = traffic.adapted_norm(host, out, width, r)
    formula = formulas.adapted_norm_traffic((out, width), r, HALF)
    check(counted, formula, lanes_of_up=32)
    assert counted.writes("partial") == 1


@pytest.mark.parametrize("bits", [3, 4, 5, 8])
def test_adapted_norm_packed(host: Host, bits: int):
    counted = traffic.adapted_norm_packed(host, 64, 1024, 8, bits)
    check(
        counted,
        formulas.adapted_norm_packed_traffic((64, 1024), 8, bits, 64, HALF),
        lanes_of_up=32,
    )
    for name in ("scales", "biases"):  # one load serves the 8 lanes of a group
        assert counted.reads(name) == 8
        assert counted.is_whole(name)


@pytest.mark.parametrize(
    "out, width, r, passes",
    [(64, 1024, 64, 1), (8, 8192, 8, 1), (8, 16512, 8, 2)],
)
def test_fused_weight(host: Host, out: int, width: int, r: int, passes: int):
    counted = traffic.fused_weight(host, out, width, r)
    check(counted, formulas.fused_weight_traffic((out, width), r, HALF), passes)


@pytest.mark.parametrize("r", [8, 64])
def test_dora_scale(host: Host, r: int):
    counted = traffic.dora_scale(host, 64, 2048, r)
    check(counted, formulas.dora_scale_traffic((64, 2048), r, HALF))


def test_dora_scale_backward(host: Host):
    counted = traffic.dora_scale_backward(host, 192, 1024)
    check(counted, formulas.dora_scale_backward_traffic((192, 1024), HALF, True))
    assert counted.writes("partial") == 1


@pytest.mark.slow
def test_at_full_size(host: Host):
    for launch in traffic.LAUNCHES:
        counted = launch(host)
        for name in LARGE & set(counted.buffers):
            is_long = "16512" in counted.shape
            moved = counted.reads(name) + counted.writes(name)
            assert moved == (2 if name == "weight" and is_long else 1), counted
