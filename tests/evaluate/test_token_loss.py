import mlx.core as mx
import numpy as np
import pytest

from mlx_dora.evaluate.token_loss import token_cross_entropy
from tests.checks import assert_close, to_numpy

ROWS = 5


def material(columns: int) -> tuple[mx.array, mx.array]:
    """Logits of a model: a few large ones in front of a long tail, and targets."""
    chance = np.random.default_rng(columns)
    logits = chance.normal(-4.0, 3.0, size=(ROWS, columns))
    logits[:, :3] += 14.0
    targets = chance.integers(0, columns, ROWS)
    return mx.array(logits.astype(np.float32)), mx.array(targets.astype(np.int32))


def in_float64(
    logits: mx.array, targets: mx.array, pull: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The losses, and the gradient of their sum with weights `pull`."""
    z = to_numpy(logits)
    shares = np.exp(z - z.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    at = np.arange(len(z)), np.array(targets)
    slopes = shares.copy()
    slopes[at] -= 1
    return -np.log(shares[at]), slopes * pull[:, None]


# MLX's own: loss 1e-4 off at 49,152 columns, sum of a row of slopes 1e-4.
@pytest.mark.parametrize("columns", [1, 3, 255, 256, 257, 1000, 49_152, 50_257])
def test_loss_and_gradient_equal_float64(columns: int) -> None:
    logits, targets = material(columns)
    pull = np.array([1.0, -0.5, 2.0, 0.0, 0.25])

    def total(logits: mx.array) -> mx.array:
        return (token_cross_entropy(logits, targets) * mx.array(pull, mx.float32)).sum()

    losses, slopes = in_float64(logits, targets, pull)
    actual = to_numpy(token_cross_entropy(logits, targets))
    np.testing.assert_allclose(actual, losses, rtol=0, atol=4e-6)
    gradient = mx.grad(total)(logits)
    if columns > 1:
        assert_close(gradient, slopes, bound=3e-6)
    # The probabilities add up to 1, or every hidden state gets a common gradient.
    assert np.abs(to_numpy(gradient).sum(axis=1)).max() < 4e-6


def test_compiled_and_batched_shapes_agree() -> None:
    logits, targets = material(1000)
    flat = token_cross_entropy(logits, targets)
    cube = token_cross_entropy(logits[None], targets[None])
    assert cube.shape == (1, ROWS)
    assert to_numpy(cube[0]).tolist() == to_numpy(flat).tolist()
    half = token_cross_entropy(logits.astype(mx.float16), targets)
    assert half.dtype == mx.float32
