"""Each op on given sizes, by its kernel and by plain MLX: to check and to time.

Results are independent of ``MLX_DORA_KERNELS``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_dora.doctor import traffic
from mlx_dora.kernels.case import DORA_SCALE, Case
from mlx_dora.kernels.measure import job_of


@dataclass(frozen=True, kw_only=True)
class Job:
    """One call, with its inputs made.

    Attributes:
        case: The op with its dtype and sizes.
        arrays: Arguments of both functions.
        kernel: Launches the kernel; fails where MLX has no GPU.
        reference: Plain MLX.
        traffic: What the kernel moves.
    """

    case: Case
    arrays: tuple[mx.array, ...]
    kernel: Callable[..., Any]
    reference: Callable[..., Any]
    traffic: traffic.Traffic

    @property
    def name(self) -> str:
        """Op and what of it, as in ``adapted_norm 4-bit``."""
        return self.case.name

    @property
    def dtype(self) -> mx.Dtype:
        """Type of the large operands."""
        return self.case.dtype


def _job(case: Case, moved: traffic.Traffic) -> Job:
    both = job_of(case)
    return Job(
        case=case,
        arrays=both.inputs(0),
        kernel=both.kernel,
        reference=both.plain,
        traffic=moved,
    )


def normalize_rows_job(shape: tuple[int, int], dtype: mx.Dtype) -> Job:
    """Rescale the rows of a weight."""
    moved = traffic.normalize_rows_traffic(shape, dtype)
    return _job(Case("normalize_rows", dtype, *shape), moved)


def adapted_norm_job(
    shape: tuple[int, int],
    r: int,
    dtype: mx.Dtype,
    bits: int | None = None,
    group_size: int = 64,
) -> Job:
    """Norms of a dense weight, or of one packed in `bits`.

    The reference is given ‖W‖² as training has it, computed once for all steps.
    """
    if bits is None:
        moved = traffic.adapted_norm_traffic(shape, r, dtype)
        return _job(Case("adapted_norm", dtype, *shape, r), moved)
    moved = traffic.adapted_norm_packed_traffic(shape, r, bits, group_size, dtype)
    return _job(Case("adapted_norm", dtype, *shape, r, bits, group_size), moved)


def fused_weight_job(shape: tuple[int, int], r: int, dtype: mx.Dtype) -> Job:
    """The adapted weight of a dense one."""
    moved = traffic.fused_weight_traffic(shape, r, dtype)
    return _job(Case("fused_weight", dtype, *shape, r), moved)


def dora_scale_job(
    shape: tuple[int, int], r: int, dtype: mx.Dtype, backward: bool = False
) -> Job:
    """Scaled outputs of ``(tokens, out)``, or these and all gradients."""
    moved = traffic.dora_scale_traffic(shape, r, dtype)
    if backward:
        more = traffic.dora_scale_backward_traffic(shape, dtype, False)
        moved = traffic.Traffic(
            large=moved.large + more.large, rereads=moved.rereads, cached=moved.cached
        )
    return _job(Case(DORA_SCALE, dtype, *shape, r, has_gradients=backward), moved)
