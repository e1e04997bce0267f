"""Rescales the rows of a weight, for decomposition, recombination and merging."""

from typing import cast

import mlx.core as mx

from mlx_dora.errors import DoRAError
from mlx_dora.kernels import plain
from mlx_dora.kernels.case import Case
from mlx_dora.kernels.choice import takes_kernel
from mlx_dora.kernels.dispatch import KERNELS, run
from mlx_dora.kernels.plans import plan_normalize_rows
from mlx_dora.kernels.trial import Job, normal
from mlx_dora.matrix.weight import are_ordinary

_KERNEL = KERNELS["normalize_rows"]


def normalize_rows(
    weight: mx.array, magnitude: mx.array | None = None
) -> tuple[mx.array, mx.array]:
    r"""Rescale each output row to a given length.

    .. math:: m_j \, W_j / \lVert W_j \rVert_2

    This is Eq. 2 of DoRA (arXiv:2402.09353), read from right to left.

    Args:
        weight: Weight, shape ``(out, in)``, any float dtype.
        magnitude: New length of each row, shape ``(out,)``; None for length 1.

    Returns:
        The rescaled weight, shape ``(out, in)``, rounded once to the dtype of `weight`,
        and the row norms, shape ``(out,)``, float32. The norms are accurate for every
        finite row, and inf only where the norm exceeds the range of float32. A zero row
        stays zero.

    Raises:
        DoRAError: If `magnitude` does not have one entry per row.
    """
    if magnitude is not None and magnitude.shape != weight.shape[:1]:
        raise DoRAError(
            f"magnitude has shape {magnitude.shape}; a weight of shape "
            f"{weight.shape} needs {weight.shape[:1]}."
        )
    if weight.ndim != 2 or not takes_kernel(_case(weight), job):
        return plain.normalize_rows(weight, magnitude)
    if magnitude is None:
        magnitude = mx.ones(weight.shape[:1])
    rescaled, norm = launched(weight, magnitude.astype(mx.float32))
    if are_ordinary(mx.square(norm)):
        return rescaled, norm
    # The kernel does not scale values before squaring.
    return plain.normalize_rows(weight, magnitude)


def launched(weight: mx.array, magnitude: mx.array) -> tuple[mx.array, mx.array]:
    """Run the kernel for any size; differentiable."""
    return cast(tuple[mx.array, mx.array], _differentiable(weight, magnitude))


@mx.custom_function
def _differentiable(weight: mx.array, magnitude: mx.array) -> tuple[mx.array, mx.array]:
    out, width = weight.shape
    launch = plan_normalize_rows((out, width), weight.dtype)
    rescaled, norm = run(_KERNEL, (weight, magnitude), launch)
    return rescaled, norm


@_differentiable.vjp
def _vjp(primals, cotangents, _outputs):
    _, gradients = mx.vjp(plain.normalize_rows, list(primals), list(cotangents))
    return tuple(gradients)


def _case(weight: mx.array) -> Case:
    out, width = weight.shape
    return Case("normalize_rows", weight.dtype, out, width)


def job(case: Case) -> Job:
    """Return both sides of a case."""

    def inputs(seed: int) -> tuple[mx.array, ...]:
        weight = normal(case.rows, case.columns, seed=seed, dtype=case.dtype)
        return weight, normal(case.rows, seed=seed + 1)

    return Job(inputs=inputs, kernel=launched, plain=plain.normalize_rows)
