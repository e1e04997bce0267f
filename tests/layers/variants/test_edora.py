import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_dora.layers.variants.edora import EDoRA
from tests.checks import assert_close, to_numpy
from tests.layers.oracle import dense_weight


def decaying(out: int, width: int) -> nn.Linear:
    """Return a layer whose singular values decrease fast, so directions are unique."""
    rng = np.random.default_rng(0)
    count = min(out, width)
    left = np.linalg.qr(rng.standard_normal((out, count)))[0]
    right = np.linalg.qr(rng.standard_normal((width, count)))[0]
    linear = nn.Linear(width, out, bias=False)
    linear.weight = mx.array(((left * 1.5 ** -np.arange(count)) @ right.T).astype("f4"))
    linear.freeze()
    return linear


def test_the_factors_are_the_bases_largest_directions() -> None:
    mx.random.seed(0)
    base = decaying(20, 30)
    layer = EDoRA.adapt(base, r=4)
    left, sizes, right = np.linalg.svd(dense_weight(base), full_matrices=False)
    down, up = to_numpy(layer.lora_a), to_numpy(layer.lora_b)
    signs = np.sign((up * left[:, :4].T).sum(axis=1))
    assert_close(up, signs[:, None] * left[:, :4].T, bound=1e-4)
    assert_close(down, signs * (right[:4].T * sizes[:4]), bound=1e-4)
    layer.core = mx.eye(4)  # R = 1 adds the base's own best approximation
    best = (left[:, :4] * sizes[:4]) @ right[:4]
    a, b = (to_numpy(factor) for factor in layer.factors())
    assert_close((a @ b).T, best, bound=1e-4)


def test_r_and_m_alone_are_trained() -> None:
    layer = EDoRA.adapt(nn.Linear(12, 9).freeze(), r=3)
    flat = dict(tree_flatten(layer.trainable_parameters()))
    assert {name: value.shape for name, value in flat.items()} == {
        "core": (3, 3),
        "m": (9,),
    }


def test_a_rank_above_the_matrix_is_filled_with_zeros() -> None:
    layer = EDoRA.adapt(nn.Linear(12, 3).freeze(), r=5)
    assert not mx.any(layer.lora_a[:, 3:])
    assert not mx.any(layer.lora_b[3:])
    assert mx.isfinite(layer.lora_b).all()
