"""mlx-lm's own DoRA tests, from its source distribution, on our classes."""

import subprocess
import sys
import tarfile
import unittest
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from mlx_dora.adapters.hosting import use_in_mlx_lm
from mlx_dora.layers import DoRALinear

VERSION = version("mlx-lm")
MEMBER = f"mlx_lm-{VERSION}/tests/test_finetune.py"


@pytest.fixture(scope="module")
def own_tests(kept_folder: Callable[[str], Path]) -> Path:
    """Its ``tests/test_finetune.py``, fetched once and kept in pytest's cache."""
    folder = kept_folder(f"mlx_lm-{VERSION}")
    found = folder / "test_finetune.py"
    if found.exists():
        return found
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--no-deps",
        "--no-binary", "mlx-lm", "--dest", str(folder), f"mlx-lm=={VERSION}",
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    archives = list(folder.glob("mlx_lm-*.tar.gz"))
    if not archives:
        reason = (result.stderr.strip().splitlines() or ["no output"])[-1]
        pytest.skip(f"mlx-lm's source distribution cannot be fetched: {reason}")
    with tarfile.open(archives[0]) as archive:
        if MEMBER not in archive.getnames():
            pytest.skip("mlx-lm's source distribution no longer has its tests")
        member = archive.extractfile(MEMBER)
        assert member is not None
        aside = folder / "fetched"
        aside.write_bytes(member.read())
        aside.replace(found)
    return found


@pytest.mark.network
def test_its_dora_tests_pass_with_our_classes(own_tests: Path) -> None:
    with use_in_mlx_lm():
        spec = spec_from_file_location("mlx_lm_test_finetune", own_tests)
        assert spec is not None
        assert spec.loader is not None
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        assert module.DoRALinear is DoRALinear
        suite = unittest.defaultTestLoader.loadTestsFromTestCase(module.TestDora)
        result = unittest.TestResult()
        suite.run(result)
    problems = [text for _, text in result.failures + result.errors]
    assert problems == []
    assert result.testsRun >= 6
    assert result.skipped == []
