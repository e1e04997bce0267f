"""Adapters that answer with their own names, trained once a session."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.serve.base import write_tiny_base

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def named() -> Any:
    """The benchmarks' module that makes such adapters."""
    path = ROOT / "benchmarks" / "_named_adapters.py"
    spec = importlib.util.spec_from_file_location("_named_adapters", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama on disk."""
    base = tmp_path_factory.mktemp("named") / "base"
    write_tiny_base(base)
    return base


@pytest.fixture(scope="session")
def named_adapters(named: Any, tiny_base: Path) -> dict[str, Path]:
    """Eight adapters of `tiny_base`, ranks 4 to 64, DoRA and LoRA, by name."""
    make: Callable[..., dict[str, Path]] = named.make_adapters
    return make(tiny_base, tiny_base.parent / "adapters")
