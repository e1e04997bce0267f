"""Every kernel over the whole grid: values, and what the checkers say."""

from collections.abc import Callable

import numpy as np
import pytest

from mlx_dora.kernels.plans import KERNELS
from tests.checks import to_numpy
from tests.metal_host.cases import Case, worst_error
from tests.metal_host.execute import FLUSH_DENORMALS, HEAP, MISALIGN
from tests.metal_host.host import Host, call

Prepare = Callable[..., Host]

# The second stages run with the first ones.
KERNELS_TESTED = sorted(set(KERNELS) - {"dora_scale_columns", "adapted_norm_total"})


def judged(host: Host, cases: list[Case], mode: str, **options: int) -> list[str]:
    """What is wrong, over these cases; they must have launched something."""
    wrong = []
    with host.running(mode, **options):
        for case in cases:
            for index, (output, truth, bound) in enumerate(case.run(call)):
                error = worst_error(output, truth)
                if not error <= bound:
                    wrong.append(f"{case.name}: output {index} wrong by {error:.1e}")
        assert len(host.outcomes) >= len(cases) > 0
        wrong += [f"{kind}: {text}" for kind, text in host.findings.items()]
    return wrong


def of(kernel: str, cases: list[Case]) -> list[Case]:
    return [case for case in cases if case.kernel == kernel]


@pytest.mark.parametrize("kernel", KERNELS_TESTED)
def test_right_and_clean_in_the_exact_checker(kernel, prepared: Prepare, every_case):
    assert judged(prepared("check"), of(kernel, every_case), "check") == []


@pytest.mark.parametrize("kernel", KERNELS_TESTED)
def test_buffers_may_start_at_any_element(kernel, prepared: Prepare, every_case):
    cases = [c for c in of(kernel, every_case) if "float32" in c.name]
    assert judged(prepared("check"), cases, "check", flags=MISALIGN) == []


@pytest.mark.parametrize("kernel", KERNELS_TESTED)
def test_right_and_clean_with_wide_accesses(kernel, prepared: Prepare, every_case):
    cases = of(kernel, every_case)
    assert judged(prepared("check-wide"), cases, "check-wide") == []


@pytest.mark.parametrize("kernel", KERNELS_TESTED)
def test_wide_accesses_only_at_aligned_addresses(
    kernel, prepared: Prepare, every_case, in_half
):
    host = prepared("check-wide")
    cases = of(kernel, every_case)
    assert judged(host, cases, "check-wide", flags=MISALIGN) == []
    host = prepared("sanitize-wide", in_half)
    flags = HEAP | MISALIGN
    assert judged(host, of(kernel, in_half), "sanitize-wide", flags=flags) == []


@pytest.fixture(scope="session")
def in_half(every_case) -> list[Case]:
    """One dtype, where what is tested is the same in all: addresses and order."""
    return [c for c in every_case if "-float16-" in c.name or "-float32-9x" in c.name]


@pytest.mark.parametrize("kernel", KERNELS_TESTED)
def test_clean_under_both_sanitizers(kernel, prepared: Prepare, in_half):
    host, flags = prepared("sanitize", in_half), HEAP | MISALIGN
    assert judged(host, of(kernel, in_half), "sanitize", flags=flags) == []


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS_TESTED)
def test_clean_under_both_sanitizers_in_every_dtype(
    kernel, prepared: Prepare, every_case
):
    host, cases = prepared("sanitize"), of(kernel, every_case)
    assert judged(host, cases, "sanitize", flags=HEAP | MISALIGN) == []


@pytest.mark.parametrize("kernel", KERNELS_TESTED)
def test_the_order_of_threads_does_not_matter(kernel, prepared: Prepare, in_half):
    host = prepared("check")  # compiled for other tests already
    cases = [case for case in of(kernel, in_half) if case.is_small]
    orders = []
    for seed in range(4):
        with host.running("check", seed=seed):
            results = [result for case in cases for result in case.run(call)]
        assert all(worst_error(o, t) <= bound for o, t, bound in results), seed
        orders.append([to_numpy(output).tobytes() for output, _, _ in results])
    assert len(orders[0]) >= len(cases) > 0
    assert all(values == orders[0] for values in orders)


@pytest.mark.parametrize("kernel", KERNELS_TESTED)
def test_flushed_denormals_change_nothing(kernel, prepared: Prepare, every_case):
    cases = [c for c in of(kernel, every_case) if "float32" in c.name and c.is_small]
    host = prepared("check")
    assert judged(host, cases, "check", flags=FLUSH_DENORMALS) == []


def test_threadgroup_memory_fits_every_chip(prepared: Prepare, in_half):
    host = prepared("check")
    with host.running("check"):
        for case in in_half:
            case.run(call)
        used = {r.name: o.threadgroup_bytes for r, o in host.outcomes}
    assert 0 < max(used.values()) <= 32768, used


def test_a_nan_is_not_taken_for_right():
    assert worst_error(np.array([1.0, np.nan]), np.ones(2)) == np.inf
    with pytest.raises(AssertionError, match="not finite"):
        worst_error(np.ones(2), np.array([1.0, np.nan]))
