from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.metal_host.build import COMPILER, Builder
from tests.metal_host.cases import Case, grid
from tests.metal_host.host import Host, call, launched


@pytest.fixture(scope="session")
def host(kept_folder: Callable[[str], Path]) -> Host:
    """The stand-in device; its programs are kept from run to run, by content."""
    if COMPILER is None:
        pytest.skip("no g++: the kernels cannot be compiled for this machine")
    return Host(Builder(kept_folder("metal_host")))


@pytest.fixture(scope="session")
def every_case() -> list[Case]:
    """The grid of `cases.grid`."""
    return grid()


@pytest.fixture(scope="session")
def prepared(host: Host, every_case: list[Case]) -> Callable[..., Host]:
    """The device with these cases compiled in a mode, many kernels at a time."""

    def prepare(mode: str, cases: list[Case] = every_case) -> Host:
        host.builder.build(launched(partial(case.run, call) for case in cases), mode)
        return host

    return prepare
