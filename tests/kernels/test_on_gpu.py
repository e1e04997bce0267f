"""The grid of the host's proof on a real GPU; skipped without a GPU."""

import math

import mlx.core as mx
import pytest

from mlx_dora.doctor import examine as examining
from mlx_dora.kernels.dispatch import KERNELS, device_backend, run
from mlx_dora.kernels.plans import Launch
from tests.metal_host.cases import Call, grid, worst_error

BACKENDS = [
    pytest.param("metal", marks=pytest.mark.metal),
    pytest.param("cuda", marks=pytest.mark.cuda),
]


def call(name: str, launch: Launch, inputs: list[mx.array]) -> list[mx.array]:
    """Fill outputs with NaN first, so that unwritten values are detected."""
    return list(run(KERNELS[name], inputs, launch, initial=math.nan))


def call_on_slices(name: str, launch: Launch, inputs: list[mx.array]) -> list[mx.array]:
    """Give every input at an odd element of a larger array: MLX copies none of them."""

    def sliced(x: mx.array) -> mx.array:
        before = mx.zeros((1,), dtype=x.dtype)
        whole = mx.concatenate([before, x.reshape(-1)])
        mx.eval(whole)
        return whole[1:].reshape(x.shape)

    return call(name, launch, [sliced(x) for x in inputs])


@pytest.mark.parametrize("how", [call, call_on_slices], ids=lambda how: how.__name__)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_kernel_is_right_over_the_grid(backend: str, how: Call) -> None:
    assert device_backend() == backend
    wrong = [
        f"{case.name}: output {index} wrong by {error:.1e}"
        for case in grid()
        for index, (output, truth, bound) in enumerate(case.run(how))
        if not (error := worst_error(output, truth)) <= bound
    ]
    assert wrong == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_op_and_its_gradients_are_those_of_the_reference(backend: str) -> None:
    assert device_backend() == backend
    report = examining.examine()
    assert [check for check in report.checks if not check.is_right] == []
