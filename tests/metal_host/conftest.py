from collections.abc import Callable
from functools import partial

import pytest

from tests.metal_host.build import COMPILER, Builder
from tests.metal_host.cases import Case, grid
from tests.metal_host.host import Host, call, launched


@pytest.fixture(scope="session")
def host(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Host:
    """The stand-in device; its programs are kept from run to run, by content.

    Without pytest's cache (``-p no:cacheprovider``) they are kept for this run only.
    """
    if COMPILER is None:
        pytest.skip("no g++: the kernels cannot be compiled for this machine")
    cache: pytest.Cache | None = getattr(pytestconfig, "cache", None)
    if cache is None:
        return Host(Builder(tmp_path_factory.mktemp("metal_host")))
    return Host(Builder(cache.mkdir("metal_host")))


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
