"""Buffers and launch geometry of the kernels, as functions of shapes.

Each ``metal/<name>.metal`` has an entry, which its head comment describes in words.
Grids are in threads, as MLX expects, and multiples of the threadgroup. A threadgroup
has at most 256 threads, because some chips reject more for some kernels.
"""

from dataclasses import dataclass

import mlx.core as mx

_THREADS = 256
_SIMD = 32
_GROUPS = _THREADS // _SIMD  # simdgroups of a full threadgroup
# Floats of adapted rows that a thread holds between two passes.
_HELD = 16  # for one row, of up to 4096 columns
_HELD_ROWS = 64  # for several rows
# Floats of h in threadgroup memory: 16 KB.
_H_TILE = 4096
_CHUNK = 64  # tokens that one threadgroup sums


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """Buffers of ``metal/<name>.metal``, in order."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Launch parameters of a call, with the shapes and dtypes of its outputs."""

    template: tuple[tuple[str, mx.Dtype | int | bool], ...]
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    output_shapes: tuple[tuple[int, ...], ...]
    output_dtypes: tuple[mx.Dtype, ...]


_LOW_RANK = ("lora_a", "lora_b", "scale")

KERNELS = {
    name: Kernel(name=name, inputs=inputs, outputs=outputs)
    for name, inputs, outputs in (
        ("normalize_rows", ("weight", "magnitude"), ("rescaled", "norm")),
        ("adapted_norm", ("weight", *_LOW_RANK), ("norm",)),
        ("adapted_norm_packed", ("weight", "scales", "biases", *_LOW_RANK), ("norm",)),
        ("fused_weight", ("weight", *_LOW_RANK, "magnitude"), ("fused",)),
        ("dora_scale", ("y", "h", "up", "gain", "offset"), ("composed",)),
        ("dora_scale_backward", ("dy", "o", "gain", "offset"), ("scaled", "partial")),
        ("dora_scale_columns", ("partial", "gain"), ("sums",)),
    )
}


def plan_normalize_rows(shape: tuple[int, int], dtype: mx.Dtype) -> Launch:
    """Plan one threadgroup per row, kept in registers up to 4096 columns."""
    out, width = shape
    reads, threads = 4, _threads_for(width, 4)
    steps = _ceil(width, threads * reads)
    return Launch(
        template=(("T", dtype), ("N", reads), ("STEPS", _held(steps, reads))),
        grid=(threads * out, 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=(shape, (out,)),
        output_dtypes=(dtype, mx.float32),
    )


def plan_adapted_norm(shape: tuple[int, int], r: int) -> Launch:
    """Plan more rows per simdgroup for larger matrices, so that A is read less."""
    template = (("R", r), ("ROWS", _rows_of_simdgroup(shape[0])), ("N", 4))
    return _norm_launch(shape[0], template)


def plan_adapted_norm_packed(out: int, r: int, bits: int, group_size: int) -> Launch:
    """Plan like `plan_adapted_norm`; a thread's 8 columns are exactly `bits` bytes."""
    rows = _rows_of_simdgroup(out)
    return _norm_launch(
        out, (("R", r), ("ROWS", rows), ("BITS", bits), ("GROUP", group_size))
    )


def _rows_of_simdgroup(out: int) -> int:
    """Return 1, 2 or 4, so that large matrices have at least 64 threadgroups."""
    return 4 if out >= 2048 else 2 if out >= 1024 else 1


def _norm_launch(out: int, template: tuple[tuple[str, int], ...]) -> Launch:
    tile = _GROUPS * dict(template)["ROWS"]
    return Launch(
        template=template,
        grid=(_THREADS * _ceil(out, tile), 1, 1),
        threadgroup=(_THREADS, 1, 1),
        output_shapes=((out,),),
        output_dtypes=(mx.float32,),
    )


def plan_fused_weight(shape: tuple[int, int], r: int, dtype: mx.Dtype) -> Launch:
    """Plan as many rows per threadgroup as fit in registers and 16 KB; they share A."""
    out, width = shape
    reads, threads = 4, _threads_for(width, 4)
    steps = _ceil(width, threads * reads)
    held = _held(steps, reads)
    rows = _power_of_two(min(8, _HELD_ROWS // (reads * max(held, 1)), _H_TILE // r))
    return Launch(
        template=(
            ("T", dtype),
            ("R", r),
            ("ROWS", rows),
            ("N", reads),
            ("STEPS", held),
        ),
        grid=(threads * _ceil(out, rows), 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=(shape,),
        output_dtypes=(dtype,),
    )


def plan_dora_scale(
    shape: tuple[int, int], r: int, dtype: mx.Dtype, has_offset: bool
) -> Launch:
    """Plan up to 16 tokens per threadgroup, which share reads of B."""
    tokens, out = shape
    reads, threads = 4, _threads_for(out, 4)
    rows = _power_of_two(min(16, tokens, _H_TILE // r))
    return Launch(
        template=(
            ("T", dtype),
            ("R", r),
            ("ROWS", rows),
            ("N", reads),
            ("HAS_OFFSET", has_offset),
        ),
        grid=(threads * _ceil(tokens, rows), _ceil(out, threads * reads), 1),
        threadgroup=(threads, 1, 1),
        output_shapes=(shape,),
        output_dtypes=(dtype,),
    )


def plan_dora_scale_backward(
    shape: tuple[int, int], dtype: mx.Dtype, has_offset: bool
) -> Launch:
    """Plan the first stage: chunks of tokens by strips of 128 columns."""
    tokens, out = shape
    reads = 4
    chunks = _ceil(tokens, _CHUNK)
    return Launch(
        template=(
            ("T", dtype),
            ("N", reads),
            ("CHUNK", _CHUNK),
            ("HAS_OFFSET", has_offset),
        ),
        grid=(_THREADS * chunks, _ceil(out, _SIMD * reads), 1),
        threadgroup=(_THREADS, 1, 1),
        output_shapes=(shape, (1 + has_offset, chunks, out)),
        output_dtypes=(dtype, mx.float32),
    )


def plan_dora_scale_columns(sums: int, _chunks: int, out: int) -> Launch:
    """Plan the second stage, one thread per column, from the shape of the sums."""
    return Launch(
        template=(),
        grid=(_THREADS * _ceil(out, _THREADS), sums, 1),
        threadgroup=(_THREADS, 1, 1),
        output_shapes=((sums, out),),
        output_dtypes=(mx.float32,),
    )


def _ceil(n: int, step: int) -> int:
    return -(-n // step)


def _threads_for(width: int, reads: int) -> int:
    """Return a number of threads in whole simdgroups, as many as the columns need."""
    return min(_THREADS, _SIMD * _ceil(width, _SIMD * reads))


def _held(steps: int, reads: int) -> int:
    """Return the steps whose values stay in registers; 0 if the row is too long."""
    return steps if steps * reads <= _HELD else 0


def _power_of_two(limit: int) -> int:
    return 1 << (max(limit, 1).bit_length() - 1)
