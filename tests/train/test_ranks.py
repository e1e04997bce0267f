from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_map

from mlx_dora import DoRAConfig, apply_dora
from mlx_dora.adapters.surgery import dora_layers
from mlx_dora.train.ranks import Holder, deal, reallocate
from tests.checks import assert_close, to_numpy


def holder(cost: int, *worth: float, room: int = 6) -> Holder:
    active = np.arange(room) < len(worth)
    return Holder(cost=cost, active=active, worth=np.pad(worth, (0, room - len(worth))))


def ranks(holders: dict[str, Holder]) -> list[int]:
    return [int(h.active.sum()) for h in holders.values()]


def parameters(holders: dict[str, Holder]) -> int:
    return sum(h.cost * int(h.active.sum()) for h in holders.values())


def test_a_rank_goes_where_ranks_are_worth_most() -> None:
    holders = {"a": holder(10, 8, 9, 7), "b": holder(10, 5, 1, 4)}
    deal(holders)
    assert ranks(holders) == [4, 2]
    assert list(holders["b"].active[:3]) == [True, False, True]


def test_similar_layers_keep_their_ranks() -> None:
    holders = {"a": holder(10, 3, 2, 2.5), "b": holder(10, 2, 3, 1.5)}
    deal(holders)
    assert ranks(holders) == [3, 3]


@pytest.mark.parametrize("seed", range(5))
def test_the_budget_holds_and_every_layer_keeps_a_rank(seed: int) -> None:
    rng = np.random.default_rng(seed)
    holders = {
        str(i): holder(int(rng.integers(5, 50)), *rng.lognormal(0, 3, 3))
        for i in range(12)
    }
    before = parameters(holders)
    for _ in range(20):
        deal(holders)
        assert parameters(holders) <= before
        assert 1 <= min(ranks(holders)) <= max(ranks(holders)) <= 6
    assert len(set(ranks(holders))) > 1


def test_only_removed_ranks_change_the_model(
    make_tiny_model: Callable[..., nn.Module],
) -> None:
    model = make_tiny_model()
    config = DoRAConfig(variant="adaptive", rank=3, scale=1.0, num_layers=-1)
    apply_dora(model, config)
    rng = np.random.default_rng(0)
    layers = dora_layers(model)
    for _, layer in layers:
        size = float(rng.lognormal(-4, 2))
        noise = rng.standard_normal(layer.lora_b.shape) * size
        layer.lora_b = mx.array(noise.astype(np.float32))
    before = {path: to_numpy(layer.factors()[1]) for path, layer in layers}
    gradient = tree_map(mx.ones_like, model.trainable_parameters())
    new_ranks = reallocate(model, gradient)
    assert len(set(new_ranks.values())) > 1
    for path, layer in layers:
        active = np.array(layer["active"]) > 0
        assert active.sum() == new_ranks[path]
        expected = before[path] * active[:, None]  # new ranks are zero
        assert_close(layer.factors()[1], expected, bound=1e-7)
        assert layer.export().lora_b.shape[0] == new_ranks[path]
