import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_dora.layers.variants.pissa import PiSSA, principal_factors
from tests.checks import assert_close, to_numpy
from tests.layers.oracle import dense_weight, quantized


def spectrum(weight: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    left, sizes, right = np.linalg.svd(weight, full_matrices=False)
    return sizes, (left[:, :rank] * sizes[:rank]) @ right[:rank]


@pytest.mark.parametrize("shape", [(96, 128), (128, 96), (5, 64)])
def test_the_start_is_the_best_approximation(shape: tuple[int, int]) -> None:
    mx.random.seed(0)
    sizes = mx.array(1.3 ** -np.arange(min(shape), dtype=np.float32))
    left = mx.linalg.qr(mx.random.normal((shape[0], sizes.size)), stream=mx.cpu)[0]
    right = mx.linalg.qr(mx.random.normal((shape[1], sizes.size)), stream=mx.cpu)[0]
    weight = (left * sizes) @ right.T
    down, up = principal_factors(weight, 4)
    product = to_numpy(up).T @ to_numpy(down).T
    _, best = spectrum(to_numpy(weight), 4)
    assert_close(product, best, bound=1e-4)
    both = [np.linalg.norm(to_numpy(v), axis=a) for v, a in ((down, 0), (up, 1))]
    np.testing.assert_allclose(both[0], both[1], rtol=1e-4)


def test_a_flat_spectrum_keeps_nearly_the_largest_share() -> None:
    mx.random.seed(0)
    linear = quantized(nn.Linear(256, 128), 64, 4)
    layer = PiSSA.adapt(linear, r=8, scale=4.0)
    weight = dense_weight(linear)
    rest = weight - 4.0 * (to_numpy(layer["start_a"]) @ to_numpy(layer["start_b"])).T
    sizes, best = spectrum(weight, 8)
    kept = 1 - np.linalg.norm(rest) ** 2 / np.linalg.norm(weight) ** 2
    assert kept > 0.97 * np.linalg.norm(best) ** 2 / (sizes**2).sum()


def test_only_the_moving_factors_are_trained() -> None:
    layer = PiSSA.adapt(nn.Linear(12, 9).freeze(), r=2, scale=1.0)
    names = {name for name, _ in tree_flatten(layer.trainable_parameters())}
    assert names == {"lora_a", "lora_b", "m"}
    assert mx.array_equal(layer.lora_a, layer["start_a"])


def test_a_rank_above_the_matrix_is_filled_with_zeros() -> None:
    layer = PiSSA.adapt(nn.Linear(12, 3, bias=False), r=5, scale=1.0)
    assert not mx.any(layer.lora_b[3:] != 0)
    x = mx.random.normal((4, 12))
    np.testing.assert_allclose(to_numpy(layer(x)), to_numpy(layer.linear(x)), atol=1e-5)
