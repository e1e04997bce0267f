"""Launches of every kernel over sizes, ranks, dtypes and bit widths, with the truth.

The sizes of CONVENTIONS section 8 (1, 3, 31, 33, 1000, 4096), and those at which a
kernel takes another path: rows past its registers, several rounds of rows, ranks past a
tile. Arrays of fewer than 8 elements are in there too: MLX passes them in
`constant` memory.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import mlx.core as mx
import numpy as np

from mlx_dora.kernels import plans as table
from tests.checks import BOUNDS, to_numpy

Call = Callable[[str, table.Launch, list[mx.array]], list[mx.array]]

DTYPES = tuple(BOUNDS)
BITS = (2, 3, 4, 5, 6, 8)
GROUPS = (32, 64, 128)
# A device of one core takes every path of a launch with the fewest threads to emulate.
CORES = 1
_SCALE = 0.7


@dataclass(frozen=True)
class Case:
    """One use of a kernel.

    Attributes:
        name: Kernel, dtype and sizes.
        kernel: The kernel under test, as in ``metal/<kernel>.metal``.
        run: Launches it through a `Call`; gives outputs with their truth in float64
            and the error allowed, relative to the larger of the entry and the mean.
        is_small: Cheap enough for every order of the threads and for the mutants.
    """

    name: str
    kernel: str
    run: Callable[[Call], list[tuple[mx.array, np.ndarray, float]]]
    is_small: bool


def worst_error(actual: mx.array | np.ndarray, truth: np.ndarray) -> float:
    """Largest error of an entry, relative to it or to the mean; inf for a NaN."""
    values = to_numpy(actual)
    assert np.isfinite(truth).all(), "the expected values are not finite"
    assert values.shape == truth.shape, f"shape {values.shape}, expected {truth.shape}"
    if not np.isfinite(values).all():
        return float("inf")
    scale = np.maximum(np.abs(truth), np.abs(truth).mean() + 1e-30)
    return float((np.abs(values - truth) / scale).max())


def _normal(*shape: int, dtype: mx.Dtype = mx.float32, seed: int = 0) -> mx.array:
    values = np.random.default_rng((seed, *shape)).standard_normal(shape)
    return mx.array(values.astype(np.float32)).astype(dtype)


def _short(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")


@lru_cache
def _low_rank(out: int, width: int, r: int) -> tuple[mx.array, mx.array, np.ndarray]:
    """A, B and s·(BA) in float64."""
    a = _normal(width, r, seed=1) / max(width, 1) ** 0.5
    b = _normal(r, out, seed=2)
    mx.eval(a, b)
    return a, b, float(np.float32(_SCALE)) * (to_numpy(a) @ to_numpy(b)).T


def _total(call: Call, partial: mx.array) -> list[mx.array]:
    """Launch the second stage of a norm."""
    strips, out = partial.shape[1:]
    return call(
        "adapted_norm_total", table.plan_adapted_norm_total(2, strips, out), [partial]
    )


def _floored(base: np.ndarray, update: np.ndarray) -> np.ndarray:
    squares = [np.square(v).sum(axis=1) for v in (base + update, base, update)]
    return np.sqrt(np.maximum(squares[0], 2.0**-20 * (squares[1] + squares[2])))


def _rescaled(rows: np.ndarray, magnitude: np.ndarray) -> np.ndarray:
    norm = np.linalg.norm(rows, axis=1)
    gain = np.where(norm > 0, magnitude / np.where(norm > 0, norm, 1.0), 0.0)
    return gain[:, None] * rows


def normalize_rows(out: int, width: int, dtype: mx.Dtype) -> Case:
    """Rows of any length; where there are several, one of zeros and one below 1."""

    def run(call: Call) -> list[tuple[mx.array, np.ndarray, float]]:
        weight, magnitude = _normal(out, width, dtype=dtype), _normal(out, seed=3)
        if out > 2:
            weight[1], weight[2] = 0, weight[2] / 64
        launch = table.plan_normalize_rows((out, width), dtype)
        rescaled, norm = call("normalize_rows", launch, [weight, magnitude])
        rows = to_numpy(weight)
        return [
            (rescaled, _rescaled(rows, to_numpy(magnitude)), BOUNDS[dtype]),
            (norm, np.linalg.norm(rows, axis=1), BOUNDS[mx.float32]),
        ]

    name = f"normalize_rows-{_short(dtype)}-{out}x{width}"
    return Case(name, "normalize_rows", run, out * width <= 40_000)


def adapted_norm(out: int, width: int, r: int, dtype: mx.Dtype) -> Case:
    """A dense weight; where there are several rows, its update cancels row 1."""

    def run(call: Call) -> list[tuple[mx.array, np.ndarray, float]]:
        a, b, update = _low_rank(out, width, r)
        weight = _normal(out, width, dtype=dtype)
        if out > 2:
            weight[1] = mx.array(-update[1].astype(np.float32)).astype(dtype)
        launch = table.plan_adapted_norm((out, width), r, dtype, cores=CORES)
        (partial,) = call("adapted_norm", launch, [weight, a, _SCALE * b])
        (norm,) = _total(call, partial)
        return [(norm, _floored(to_numpy(weight), update), BOUNDS[mx.float32])]

    name = f"adapted_norm-{_short(dtype)}-{out}x{width}-r{r}"
    return Case(name, "adapted_norm", run, out * width * max(r, 8) <= 400_000)


def adapted_norm_packed(
    out: int, width: int, r: int, bits: int, group: int, dtype: mx.Dtype
) -> Case:
    """A weight packed by `mx.quantize`, unpacked by MLX for the truth."""

    def run(call: Call) -> list[tuple[mx.array, np.ndarray, float]]:
        a, b, update = _low_rank(out, width, r)
        packed = mx.quantize(
            _normal(out, width, dtype=dtype), group_size=group, bits=bits
        )
        base = unpack(*packed, bits=bits, group=group)
        launch = table.plan_adapted_norm_packed(
            (out, width), r, bits, group, cores=CORES
        )
        (partial,) = call("adapted_norm_packed", launch, [*packed, a, _SCALE * b])
        (norm,) = _total(call, partial)
        return [(norm, _floored(base, update), BOUNDS[mx.float32])]

    name = f"adapted_norm_packed-{_short(dtype)}-{out}x{width}-r{r}-{bits}bit-g{group}"
    return Case(name, "adapted_norm_packed", run, out * width * max(r, 8) <= 400_000)


def unpack(
    weight: mx.array, scales: mx.array, biases: mx.array, *, bits: int, group: int
) -> np.ndarray:
    """The weight that these codes stand for, exactly: scale * code + bias."""
    words = np.array(weight)
    stream = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")
    codes = stream.reshape(len(words), -1, bits) @ (1 << np.arange(bits))
    factor, offset = (np.repeat(to_numpy(v), group, axis=1) for v in (scales, biases))
    return factor * codes + offset


def fused_weight(out: int, width: int, r: int, dtype: mx.Dtype) -> Case:
    """The adapted weight itself."""

    def run(call: Call) -> list[tuple[mx.array, np.ndarray, float]]:
        a, b, update = _low_rank(out, width, r)
        weight, magnitude = _normal(out, width, dtype=dtype), _normal(out, seed=3)
        launch = table.plan_fused_weight((out, width), r, dtype, cores=CORES)
        inputs = [weight, a.T, _SCALE * b, magnitude]
        (fused,) = call("fused_weight", launch, inputs)
        truth = _rescaled(to_numpy(weight) + update, to_numpy(magnitude))
        return [(fused, truth, BOUNDS[dtype])]

    name = f"fused_weight-{_short(dtype)}-{out}x{width}-r{r}"
    return Case(name, "fused_weight", run, out * width * max(r, 8) <= 400_000)


def dora_scale(
    tokens: int, out: int, r: int, dtype: mx.Dtype, has_offset: bool
) -> Case:
    """Forward; the gain of column 0 is zero."""

    def run(call: Call) -> list[tuple[mx.array, np.ndarray, float]]:
        y, h = (
            _normal(tokens, out, dtype=dtype),
            _normal(tokens, r, dtype=dtype, seed=4),
        )
        up, gain = _normal(r, out, seed=2) / r**0.5, _normal(out, seed=3)
        offset = _normal(out, seed=6)
        gain[0] = 0
        launch = table.plan_dora_scale((tokens, out), r, dtype, has_offset, cores=CORES)
        inputs = [y, h, up, gain, offset if has_offset else gain]
        (composed,) = call("dora_scale", launch, inputs)
        truth = to_numpy(gain) * (to_numpy(y) + to_numpy(h) @ to_numpy(up))
        truth += to_numpy(offset) if has_offset else 0
        return [(composed, truth, BOUNDS[dtype])]

    name = f"dora_scale-{_short(dtype)}-{tokens}x{out}-r{r}" + "-offset" * has_offset
    return Case(name, "dora_scale", run, tokens * out * max(r, 8) <= 400_000)


def dora_scale_backward(
    tokens: int, out: int, dtype: mx.Dtype, has_offset: bool
) -> Case:
    """Both stages: the scaled cotangent, and the sums over tokens; gain[0] is zero."""

    def run(call: Call) -> list[tuple[mx.array, np.ndarray, float]]:
        dy, o = (_normal(tokens, out, dtype=dtype, seed=s) for s in (7, 8))
        gain, offset = _normal(out, seed=3), _normal(out, seed=6)
        gain[0] = 0
        launch = table.plan_dora_scale_backward(
            (tokens, out), dtype, has_offset, cores=CORES
        )
        inputs = [dy, o, gain, offset if has_offset else gain]
        scaled, partial = call("dora_scale_backward", launch, inputs)
        second = table.plan_dora_scale_columns(*launch.output_shapes[1])
        (sums,) = call("dora_scale_columns", second, [partial, gain])
        pull, g = to_numpy(dy), to_numpy(gain)
        unscaled = pull * (to_numpy(o) - (to_numpy(offset) if has_offset else 0))
        safe = np.where(g != 0, g, 1)
        columns = [np.where(g != 0, unscaled.sum(axis=0) / safe, 0)]
        if has_offset:
            columns.append(pull.sum(axis=0))
        return [
            (scaled, g * pull, BOUNDS[dtype]),
            (sums, np.stack(columns), BOUNDS[mx.float32]),
        ]

    name = (
        f"dora_scale_backward-{_short(dtype)}-{tokens}x{out}" + "-offset" * has_offset
    )
    return Case(name, "dora_scale_backward", run, tokens * out <= 50_000)


def _float_cases(dtype: mx.Dtype) -> Iterator[Case]:
    for shape in [(1, 1), (5, 3), (9, 31), (3, 33), (4, 1000), (2, 2300), (3, 4096),
                  (2, 4097), (2, 9000), (1, 16400)]:  # fmt: skip
        yield normalize_rows(*shape, dtype)
    for shape in [(1, 1), (9, 31), (3, 33), (17, 300)]:
        for r in (1, 8, 64):
            yield adapted_norm(*shape, r, dtype)
            yield fused_weight(*shape, r, dtype)
    for r in (1, 8, 64):
        yield adapted_norm(3, 1000, r, dtype)
        yield fused_weight(33, 1000, r, dtype)
    yield adapted_norm(3, 257, 8, dtype)  # one column past whole strips
    yield adapted_norm(2, 4096, 8, dtype)
    for r in (8, 17):
        yield adapted_norm(141, 300, r, dtype)  # several rounds; wide and narrow strips
    yield adapted_norm(20, 64, 17, dtype)  # aligned columns of B, and 4 of 8 rows
    yield adapted_norm(290, 130, 33, dtype)  # rounds with a second tile of ranks
    yield adapted_norm(530, 40, 3, dtype)
    yield adapted_norm(10, 70, 17, dtype)
    yield adapted_norm(5, 300, 16, dtype)  # the last rank with wide strips
    yield adapted_norm(9, 40, 512, dtype)
    yield fused_weight(17, 2300, 8, dtype)  # 4 rows in registers
    yield fused_weight(3, 4096, 8, dtype)  # 1 row
    yield fused_weight(9, 4100, 8, dtype)  # 2 rows
    yield fused_weight(5, 16400, 3, dtype)  # past the registers
    yield fused_weight(9, 70, 17, dtype)
    yield fused_weight(9, 40, 512, dtype)
    for has_offset in (False, True):
        for shape in [(1, 1), (3, 31), (17, 33), (2, 1000), (2, 1200), (1, 1200)]:
            yield dora_scale(*shape, 8, dtype, has_offset)
            yield dora_scale_backward(*shape, dtype, has_offset)
        yield dora_scale_backward(130, 133, dtype, has_offset)  # nine chunks
    yield dora_scale_backward(150, 400, dtype, True)  # chunks of unequal length
    yield dora_scale_backward(20, 12, dtype, True)  # gains aligned, 4 of 8 columns
    for r in (1, 64, 512):
        yield dora_scale(19, 33, r, dtype, r == 1)
    yield dora_scale(33, 4096, 8, dtype, True)


def grid() -> list[Case]:
    """Every case, cheap ones and dear ones."""
    cases = [case for dtype in DTYPES for case in _float_cases(dtype)]
    for bits in BITS:
        for group in GROUPS:
            width = {32: 96, 64: 320, 128: 384}[group]
            cases.append(adapted_norm_packed(9, width, 8, bits, group, mx.float32))
        for dtype in (mx.float16, mx.bfloat16):
            cases.append(adapted_norm_packed(3, 1088, 1, bits, 64, dtype))
        cases.append(adapted_norm_packed(9, 64, 64, bits, 64, mx.float16))
    for r in (1, 17, 512):
        cases.append(adapted_norm_packed(9, 128, r, 4, 32, mx.bfloat16))
    cases.append(adapted_norm_packed(1, 32, 1, 4, 32, mx.float32))
    for r in (8, 17):
        cases.append(adapted_norm_packed(141, 320, r, 4, 64, mx.float16))  # rounds
    cases.append(adapted_norm_packed(4, 4096, 8, 4, 64, mx.float16))
    return cases
