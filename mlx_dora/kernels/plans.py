"""Buffers and launch geometry of the kernels, as functions of shapes and cores.

Each ``metal/<name>.metal`` has an entry, which its head comment describes in words.
Grids are in threads, as MLX expects, and multiples of the threadgroup. A threadgroup
has at most 256 threads, because some chips reject more for some kernels.

The work is cut so that every core of the device (`cores.device_cores`) gets several
threadgroups, where the matrix is large enough. Sizes of that cut are arguments of the
launch, not of the template: MLX compiles a kernel anew for each set of template
arguments, for 2 to 4 seconds.

The kernels multiply on the ordinary arithmetic units. Above a rank that
``benchmarks/kernel_floors.py`` calculates (for the dense norm about 30 on large Apple
chips and 10 on an H200; see ``metal/README.md``), that takes longer than moving the
bytes, and MLX's matrix products are the right tool.
"""

from dataclasses import dataclass

import mlx.core as mx

from mlx_dora.kernels.cores import device_cores

_THREADS = 256
_SIMD = 32
_VECTOR = 16  # bytes that a thread accesses at once
_PER_CORE = 4  # threadgroups of a core, at least
# Vectors of a row that a thread of normalize_rows holds: few, or what longer rows need.
_HELD_VECTORS = (2, 8)
# fused_weight: rows of a threadgroup times steps of a thread; 4 floats each.
_HELD_STEPS = 16
_QUAD = 4  # columns of a thread of fused_weight and dora_scale
_TOKENS = 8  # of a threadgroup of dora_scale
_NORM_THREADS = 128
_LEAST_CHUNK = 16  # tokens whose sums are written: 8 % of the traffic in half precision


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """Buffers of ``metal/<name>.metal``, in order."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class NormTile:
    """What a threadgroup of `adapted_norm` takes in a round.

    Attributes:
        columns: Columns of a strip.
        rows: Rows of its 4 simdgroups.
        ranks: Ranks of A that it holds; A is read in every round if there are more.
    """

    columns: int
    rows: int
    ranks: int


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Launch parameters of a call, with the shapes and dtypes of its outputs."""

    template: tuple[tuple[str, mx.Dtype | int | bool], ...]
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    output_shapes: tuple[tuple[int, ...], ...]
    output_dtypes: tuple[mx.Dtype, ...]


_LOW_RANK = ("lora_a", "up")

KERNELS = {
    name: Kernel(name=name, inputs=inputs, outputs=outputs)
    for name, inputs, outputs in (
        ("normalize_rows", ("weight", "magnitude"), ("rescaled", "norm")),
        ("adapted_norm", ("weight", *_LOW_RANK), ("partial",)),
        (
            "adapted_norm_packed",
            ("weight", "scales", "biases", *_LOW_RANK),
            ("partial",),
        ),
        ("adapted_norm_total", ("partial",), ("norm",)),
        ("fused_weight", ("weight", "down", "up", "magnitude"), ("fused",)),
        ("dora_scale", ("y", "h", "up", "gain", "offset"), ("composed",)),
        ("dora_scale_backward", ("dy", "o", "gain", "offset"), ("scaled", "partial")),
        ("dora_scale_columns", ("partial", "gain"), ("sums",)),
    )
}


def plan_normalize_rows(shape: tuple[int, int], dtype: mx.Dtype) -> Launch:
    """Plan one threadgroup per row, kept in registers up to 8 vectors of a thread.

    These are 16384 columns in half precision and 8192 in float32.
    """
    out, width = shape
    reads = _VECTOR // dtype.size
    fitting = [held for held in _HELD_VECTORS if width <= _THREADS * held * reads]
    steps = fitting[0] if fitting else 0
    threads = _threads_for(width, reads * max(steps, 1))
    return Launch(
        template=(("T", dtype), ("STEPS", steps)),
        grid=(threads * out, 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=(shape, (out,)),
        output_dtypes=(dtype, mx.float32),
    )


PACKED_TILE = NormTile(columns=_SIMD * 8, rows=16, ranks=16)


def norm_tile(r: int, dtype: mx.Dtype) -> NormTile:
    """Return the tile of a dense weight: above rank 16, more rows share a read of A."""
    if r > 16:
        return NormTile(columns=_SIMD * _QUAD, rows=32, ranks=32)
    return NormTile(columns=_SIMD * _VECTOR // dtype.size, rows=16, ranks=16)


def plan_adapted_norm(
    shape: tuple[int, int], r: int, dtype: mx.Dtype, *, cores: int | None = None
) -> Launch:
    """Plan the first stage: strips of columns by as many rows as fill the cores."""
    template = (("T", dtype), ("R", r))
    return _norm_launch(shape, norm_tile(r, dtype), template, _given(cores))


def plan_adapted_norm_packed(
    shape: tuple[int, int],
    r: int,
    bits: int,
    group_size: int,
    *,
    cores: int | None = None,
) -> Launch:
    """Plan like `plan_adapted_norm`; a thread's 8 columns are exactly `bits` bytes."""
    template = (("R", r), ("BITS", bits), ("GROUP", group_size))
    return _norm_launch(shape, PACKED_TILE, template, _given(cores))


def _norm_launch(
    shape: tuple[int, int],
    tile: NormTile,
    template: tuple[tuple[str, mx.Dtype | int], ...],
    cores: int,
) -> Launch:
    out, width = shape
    strips = max(_ceil(width, tile.columns), 1)
    units = _ceil(out, tile.rows)
    # Twice as many as needed, since these threadgroups are half as large.
    rounds = max(units * strips // (2 * _PER_CORE * cores), 1)
    return Launch(
        template=template,
        grid=(_NORM_THREADS * _ceil(units, rounds), strips, 1),
        threadgroup=(_NORM_THREADS, 1, 1),
        output_shapes=((2, strips, out),),
        output_dtypes=(mx.float32,),
    )


def plan_adapted_norm_total(_two: int, _strips: int, out: int) -> Launch:
    """Plan the second stage, 32 rows per threadgroup, from the shape of the sums."""
    return Launch(
        template=(),
        grid=(_THREADS * _ceil(out, _SIMD), 1, 1),
        threadgroup=(_THREADS, 1, 1),
        output_shapes=((out,),),
        output_dtypes=(mx.float32,),
    )


def plan_fused_weight(
    shape: tuple[int, int], r: int, dtype: mx.Dtype, *, cores: int | None = None
) -> Launch:
    """Plan 4, 2 or 1 rows per threadgroup, which share reads of A.

    A threadgroup holds 4 rows of up to 4096 columns, 2 of up to 8192 or 1 of up to
    16384 in registers; longer rows are read twice. It takes fewer rows if 4 would leave
    cores without work.
    """
    out, width = shape
    wanted = _PER_CORE * _given(cores)
    fitting = [
        rows for rows in (4, 2, 1) if width <= _THREADS * _QUAD * (_HELD_STEPS // rows)
    ]
    rows = next((n for n in fitting if _ceil(out, n) >= wanted), (fitting or [4])[-1])
    steps = _HELD_STEPS // rows if fitting else 0
    threads = _threads_for(width, _QUAD * max(steps, 1))
    return Launch(
        template=(("T", dtype), ("R", r), ("ROWS", rows), ("STEPS", steps)),
        grid=(threads * _ceil(out, rows), 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=(shape,),
        output_dtypes=(dtype,),
    )


def plan_dora_scale(
    shape: tuple[int, int],
    r: int,
    dtype: mx.Dtype,
    has_offset: bool,
    *,
    cores: int | None = None,
) -> Launch:
    """Plan 8 tokens per threadgroup, which share reads of B; 1 for a single token.

    Strips of columns are as wide as leaves every core several threadgroups.
    """
    tokens, out = shape
    rows = 1 if tokens == 1 else _TOKENS
    groups = _ceil(tokens, rows)
    threads = _threads_for(out, _QUAD)
    while threads > _SIMD and groups * _ceil(out, threads * _QUAD) < _PER_CORE * _given(
        cores
    ):
        threads = _SIMD * _ceil(threads // 2, _SIMD)
    return Launch(
        template=(("T", dtype), ("R", r), ("ROWS", rows), ("HAS_OFFSET", has_offset)),
        grid=(threads * groups, _ceil(out, threads * _QUAD), 1),
        threadgroup=(threads, 1, 1),
        output_shapes=(shape,),
        output_dtypes=(dtype,),
    )


def plan_dora_scale_backward(
    shape: tuple[int, int],
    dtype: mx.Dtype,
    has_offset: bool,
    *,
    cores: int | None = None,
) -> Launch:
    """Plan the first stage: strips of columns by chunks of tokens."""
    tokens, out = shape
    strips = _ceil(out, _SIMD * (_VECTOR // dtype.size))
    length = max(tokens * strips // (2 * _PER_CORE * _given(cores)), _LEAST_CHUNK)
    chunks = _ceil(tokens, length)
    return Launch(
        template=(("T", dtype), ("HAS_OFFSET", has_offset)),
        grid=(_NORM_THREADS * chunks, strips, 1),
        threadgroup=(_NORM_THREADS, 1, 1),
        output_shapes=(shape, (1 + has_offset, chunks, out)),
        output_dtypes=(dtype, mx.float32),
    )


def plan_dora_scale_columns(sums: int, _chunks: int, out: int) -> Launch:
    """Plan the second stage, 32 columns per threadgroup, from the shape of the sums."""
    return Launch(
        template=(),
        grid=(_THREADS * _ceil(out, _SIMD), sums, 1),
        threadgroup=(_THREADS, 1, 1),
        output_shapes=((sums, out),),
        output_dtypes=(mx.float32,),
    )


def _given(cores: int | None) -> int:
    return device_cores() if cores is None else cores


def _ceil(n: int, step: int) -> int:
    return -(-n // step)


def _threads_for(width: int, reads: int) -> int:
    """Return a number of threads in whole simdgroups, as many as the columns need."""
    return min(_THREADS, _SIMD * max(_ceil(width, _SIMD * reads), 1))
