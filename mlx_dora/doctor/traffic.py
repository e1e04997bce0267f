"""Bytes that a call of each kernel moves, from its shapes and its launch.

The formulas of ``metal/README.md``. Loads of one address by several lanes of a
simdgroup count once; vectors of one value a row or column (m, norms, biases) are left
out, being thousandths of the rest.
"""

from dataclasses import dataclass

import mlx.core as mx

from mlx_dora.kernels.plans import (
    PACKED_TILE,
    Launch,
    NormTile,
    norm_tile,
    plan_adapted_norm,
    plan_adapted_norm_packed,
    plan_dora_scale,
    plan_dora_scale_backward,
    plan_fused_weight,
    plan_normalize_rows,
)

_FLOAT = 4


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes of one call.

    Attributes:
        large: Weights and activations, read and written: what memory must move.
        rereads: All reads of A, B and h together, which a cache should serve.
        cached: Size of A, B and h, which that cache must hold.
    """

    large: int
    rereads: int
    cached: int


def normalize_rows_traffic(shape: tuple[int, int], dtype: mx.Dtype) -> Traffic:
    """W read once, or twice past the register limit, and the result written."""
    facts = _facts(plan_normalize_rows(shape, dtype))
    size = shape[0] * shape[1] * dtype.size
    return Traffic(large=size * (_passes(facts) + 1), rereads=0, cached=0)


def adapted_norm_traffic(
    shape: tuple[int, int], r: int, dtype: mx.Dtype, *, cores: int | None = None
) -> Traffic:
    """W once, and the sums of each strip; A for each threadgroup, B for each strip."""
    launch = plan_adapted_norm(shape, r, dtype, cores=cores)
    weight = shape[0] * shape[1] * dtype.size
    return _norm_traffic(weight, shape, r, launch, norm_tile(r, dtype))


def adapted_norm_packed_traffic(
    shape: tuple[int, int],
    r: int,
    bits: int,
    group_size: int,
    dtype: mx.Dtype,
    *,
    cores: int | None = None,
) -> Traffic:
    """Packed W, scales and biases once; otherwise like `adapted_norm_traffic`."""
    out, width = shape
    launch = plan_adapted_norm_packed(shape, r, bits, group_size, cores=cores)
    codes = out * width * bits // 8
    scales = 2 * out * (width // group_size) * dtype.size
    return _norm_traffic(codes + scales, shape, r, launch, PACKED_TILE)


def _norm_traffic(
    weight: int, shape: tuple[int, int], r: int, launch: Launch, tile: NormTile
) -> Traffic:
    out, width = shape
    _, strips, _ = launch.output_shapes[0]
    groups = launch.grid[0] // launch.threadgroup[0]
    units = -(-out // tile.rows)
    rounds = -(-units // groups)
    stagings = groups * (rounds if r > tile.ranks else 1)
    a, b = _FLOAT * width * r, _FLOAT * out * r
    sums = 2 * _FLOAT * 2 * strips * out  # written, then read
    return Traffic(large=weight + sums, rereads=a * stagings + b * strips, cached=a + b)


def fused_weight_traffic(
    shape: tuple[int, int], r: int, dtype: mx.Dtype, *, cores: int | None = None
) -> Traffic:
    """W once, or twice past the register limit, and the result; A for each few rows."""
    out, width = shape
    facts = _facts(plan_fused_weight(shape, r, dtype, cores=cores))
    passes = _passes(facts)
    a, b = _FLOAT * width * r, _FLOAT * out * r
    return Traffic(
        large=out * width * dtype.size * (passes + 1),
        rereads=a * passes * -(-out // facts["ROWS"]) + b,
        cached=a + b,
    )


def dora_scale_traffic(
    shape: tuple[int, int], r: int, dtype: mx.Dtype, *, cores: int | None = None
) -> Traffic:
    """Read y, write the output; B for each few tokens, h for each strip of columns."""
    tokens, out = shape
    launch = plan_dora_scale(shape, r, dtype, False, cores=cores)
    h, b = tokens * r * dtype.size, _FLOAT * out * r
    strips = launch.grid[1]
    return Traffic(
        large=2 * tokens * out * dtype.size,
        rereads=h * strips + b * -(-tokens // _facts(launch)["ROWS"]),
        cached=h + b,
    )


def dora_scale_backward_traffic(
    shape: tuple[int, int],
    dtype: mx.Dtype,
    has_offset: bool,
    *,
    cores: int | None = None,
) -> Traffic:
    """Read dy and o, write g∘dy; write and read the sums of each chunk of tokens."""
    tokens, out = shape
    launch = plan_dora_scale_backward(shape, dtype, has_offset, cores=cores)
    _, partial = launch.output_shapes
    sums = _FLOAT * partial[0] * partial[1] * partial[2]
    return Traffic(large=3 * tokens * out * dtype.size + 2 * sums, rereads=0, cached=0)


def _facts(launch: Launch) -> dict[str, int]:
    return {name: value for name, value in launch.template if isinstance(value, int)}


def _passes(facts: dict[str, int]) -> int:
    return 1 if facts["STEPS"] else 2
