import copy
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_dora.layers.variants.doran_aux import DoRANAux, share_first_layers
from tests.checks import assert_close, to_numpy
from tests.layers.oracle import dense_weight
from tests.layers.variants.oracle import Params, numeric_gradients, row_norms

SCALE, ROOM = 2.0, 2
RANKS = (3, 2, 3)
SHAPES = ((8, 6), (8, 4), (6, 8))  # (in, out): projections of a block differ


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        mx.random.seed(0)
        layers = [
            DoRANAux.adapt(nn.Linear(*shape).freeze(), r=r, scale=SCALE)
            for shape, r in zip(SHAPES, RANKS, strict=True)
        ]
        share_first_layers(layers, ROOM)
        self.q, self.v, self.o = layers

    def __call__(self, x: mx.array) -> mx.array:
        return self.o(self.q(x)) + mx.pad(self.v(x), [(0, 0), (0, 4)])


@pytest.fixture
def block() -> Block:
    block = Block()
    rng = np.random.default_rng(1)
    for layer in (block.q, block.v, block.o):
        noise = rng.standard_normal(layer.lora_b.shape).astype(np.float32)
        layer.lora_b = mx.array(0.3 * noise)
    return block


def flat(tree: Any) -> dict[str, mx.array]:
    return dict(tree_flatten(tree))


def truth(p: Params, block: Block, x: np.ndarray, norms: dict[str, np.ndarray]) -> Any:
    def layer(name: str, x: np.ndarray) -> np.ndarray:
        linear, r = block[name].linear, block[name].lora_b.shape[0] // ROOM
        made = p[f"{name}.lora_a"] @ np.tanh(p["q.first.a"][: ROOM * r, :r])
        up = np.tanh(p["q.first.b"][:r, : ROOM * r]) @ p[f"{name}.lora_b"]
        v = dense_weight(linear) + SCALE * (made @ up).T
        norm = norms.setdefault(name, row_norms(v))  # a constant
        tau = np.log1p(np.exp(p[f"{name}.t"]))
        gain = p[f"{name}.m"] / (norm + tau)
        return x @ (gain[:, None] * v).T + to_numpy(linear.bias)

    return layer("o", layer("q", x)) + np.pad(layer("v", x), [(0, 0), (0, 4)])


def test_the_shared_gradient_is_the_sum_over_the_projections(block: Block) -> None:
    rng = np.random.default_rng(2)
    x, pull = rng.standard_normal((5, 8)), rng.standard_normal((5, 8))
    inputs, cotangent = (mx.array(v.astype(np.float32)) for v in (x, pull))
    params = {
        name: to_numpy(v) for name, v in flat(block.trainable_parameters()).items()
    }
    assert [name for name in params if ".first." in name] == ["q.first.a", "q.first.b"]
    norms: dict[str, np.ndarray] = {}
    assert_close(block(inputs), truth(params, block, x, norms))

    def loss(x: mx.array) -> mx.array:
        return (block(x) * cotangent).sum()

    gradients = flat(nn.value_and_grad(block, loss)(inputs)[1])
    expected = numeric_gradients(
        lambda p: float((truth(p, block, x, norms) * pull).sum()), params
    )
    assert gradients.keys() == expected.keys()
    for name, value in expected.items():
        assert np.abs(value).max() > 1e-3
        # Four products in a chain, whose parts nearly cancel.
        assert_close(gradients[name], value, bound=3e-5, tf32=2e-2)
    # Compare with separate first layers: the part of each projection.
    alone = Block()
    for name in ("q", "v", "o"):
        alone[name].update(block[name].trainable_parameters())
        own = copy.deepcopy(block.q.first)
        alone[name].first = own
        alone[name].kind.first = own

    def loss_alone(x: mx.array) -> mx.array:
        return (alone(x) * cotangent).sum()

    single = flat(nn.value_and_grad(alone, loss_alone)(inputs)[1])
    for leaf in ("a", "b"):
        total = sum(to_numpy(single[f"{name}.first.{leaf}"]) for name in "qvo")
        # The parts nearly cancel, so that TF32 shows four times as much.
        assert_close(
            gradients[f"q.first.{leaf}"], np.asarray(total), bound=1e-6, tf32=2e-2
        )
        assert np.abs(to_numpy(single[f"v.first.{leaf}"])).max() > 1e-3


def test_the_exported_layers_need_no_networks(block: Block) -> None:
    x = mx.random.normal((4, 8))
    before = to_numpy(block(x))
    for name, r in zip(("q", "v", "o"), RANKS, strict=True):
        block[name] = block[name].export()
        assert block[name].lora_a.shape[1] == r
    assert_close(block(x), before, bound=3e-6)
    assert not [name for name in flat(block.parameters()) if ".first." in name]


def test_what_is_loaded_reaches_every_projection(block: Block) -> None:
    other = Block()
    other.load_weights(list(flat(block.trainable_parameters()).items()), strict=False)
    x = mx.random.normal((4, 8))
    for name in ("q", "v"):
        assert mx.array_equal(other[name].factors()[0], block[name].factors()[0])
        assert mx.array_equal(other[name].factors()[1], block[name].factors()[1])
    assert not mx.array_equal(other(x), Block()(x))


def test_a_copy_shares_with_itself_alone(block: Block) -> None:
    twin = copy.deepcopy(block)
    before = block.v.factors()[0]
    first = twin.q["first"]
    first.a = first.a + 1
    assert not mx.array_equal(twin.v.factors()[0], before)
    assert mx.array_equal(block.v.factors()[0], before)


def test_the_factors_start_as_large_as_doras() -> None:
    mx.random.seed(3)
    layer = DoRANAux.adapt(nn.Linear(512, 64), r=16)
    down, up = layer.factors()
    assert down.shape == (512, 16)
    assert not mx.any(up)
    assert float(down.std()) == pytest.approx((3 * 512) ** -0.5, rel=0.15)
    assert np.linalg.matrix_rank(to_numpy(down)) == 16
