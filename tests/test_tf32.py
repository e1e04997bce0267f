"""The simulated TF32, and the layers under it."""

import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from tests.checks import to_numpy
from tests.tf32 import product, rounded

ROOT = Path(__file__).parent.parent


def test_rounding_keeps_ten_bits_and_ties_to_even() -> None:
    steps = np.array([0.0, 0.5, 0.501, 1.0, 1.5, 2.5], np.float32)
    values = mx.array((1 + steps * 2.0**-10).astype(np.float32))
    expected = 1 + np.array([0, 0, 1, 1, 2, 2]) * 2.0**-10
    assert np.array_equal(to_numpy(rounded(values)), expected)
    assert np.array_equal(to_numpy(rounded(-values)), -expected)
    assert (rounded(mx.zeros(3)) == 0).all()
    half = mx.ones(3, dtype=mx.float16)
    assert rounded(half) is half


def test_a_product_and_its_gradient_are_those_of_rounded_factors() -> None:
    random = np.random.default_rng(0)
    a = mx.array(random.standard_normal((3, 5, 64)).astype(np.float32))
    b = mx.array(random.standard_normal((64, 7)).astype(np.float32))
    exact = to_numpy(rounded(a)) @ to_numpy(rounded(b))
    got = to_numpy(product(a, b))
    assert np.abs(got - exact).max() < 1e-4
    assert np.abs(got - to_numpy(a) @ to_numpy(b)).max() > 1e-3
    da, db = mx.grad(lambda a, b: product(a, b).sum(), argnums=(0, 1))(a, b)
    rows = to_numpy(rounded(b)).sum(axis=1)
    assert np.abs(to_numpy(da) - rows).max() < 1e-4
    assert np.abs(to_numpy(db)[:, 0] - to_numpy(rounded(a)).sum((0, 1))).max() < 1e-4


@pytest.mark.parametrize(
    "paths",
    [
        ["tests/layers/test_inference.py", "tests/layers/test_embedding.py"],
        pytest.param(["tests/layers"], marks=pytest.mark.slow),
    ],
)
def test_the_layers_pass_on_a_device_that_multiplies_in_tf32(paths: list[str]) -> None:
    command = [sys.executable, "-m", "pytest", "-p", "tests.tf32", "-n", "0", "-q"]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", "--tb=line", *paths],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
