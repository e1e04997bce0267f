import logging
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_dora.data.schedule import Schedule
from mlx_dora.errors import DoRAError
from mlx_dora.layers import DoRALinear
from mlx_dora.train import TrainConfig
from mlx_dora.train.bilevel import BilevelStepper
from tests.checks import assert_close, to_numpy
from tests.layers.variants.oracle import Params, numeric_gradients, row_norms, update
from tests.train.conftest import EXAMPLES
from tests.train.saved import same_bits, tensors

Run = Callable[..., Any]
Data = tuple[np.ndarray, np.ndarray]
SCALE, RATE = 2.0, 0.5


def squares(model: Any, x: mx.array, y: mx.array) -> tuple[mx.array, mx.array]:
    """Mean loss and number of "targets"; rows of NaN are none."""
    count = mx.isfinite(y[:, 0]).sum()
    errors = mx.where(mx.isfinite(y), model.layer(x) - y, 0.0)
    return mx.square(errors).sum() / mx.maximum(count, 1), count


def loss64(p: Params, data: Data, w: np.ndarray, norm: np.ndarray) -> float:
    x, y = data
    adapted = (p["m"] / norm)[:, None] * (w + SCALE * update(p))
    return float(np.square(x @ adapted.T - y).sum() / len(x))


def gradient64(p: Params, data: Data, w: np.ndarray) -> Params:
    norm = row_norms(w + SCALE * update(p))  # a constant
    return numeric_gradients(lambda q: loss64(q, data, w, norm), p)


class One(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        mx.random.seed(0)
        self.layer = DoRALinear.from_base(
            nn.Linear(7, 5, bias=False).freeze(), r=2, scale=SCALE
        )
        self.layer.lora_b = 0.2 * mx.random.normal((2, 5))


@pytest.fixture
def data() -> list[Data]:
    rng = np.random.default_rng(0)
    return [(rng.standard_normal((6, 7)), rng.standard_normal((6, 5))) for _ in "ab"]


def batch(data: Data) -> Any:
    return tuple(mx.array(value.astype(np.float32)) for value in data)


def stepper_for(model: One, held_out: list[Data]) -> BilevelStepper:
    settings = TrainConfig(optimizer="sgd", learning_rate=RATE)
    optimizer = BilevelStepper.make_optimizer(settings)
    optimizer.init(model.trainable_parameters())
    return BilevelStepper(
        model,
        optimizer,
        [map(batch, iter(held_out))],
        loss=squares,
        group=mx.distributed.init(),
        settings=settings,
    )


def flat(model: One) -> Params:
    return {name: to_numpy(model.layer[name]) for name in ("lora_a", "lora_b", "m")}


def test_an_update_is_that_of_float64(data: list[Data]) -> None:
    model = One()
    w, start = to_numpy(model.layer.linear.weight), flat(model)
    rows, held_out = data
    stepper = stepper_for(model, [held_out])
    stepper.apply(stepper.gradient([batch(rows)]))
    found = flat(model)

    lower = gradient64(start, rows, w)
    new = {n: start[n] - RATE * lower[n] for n in ("lora_a", "lora_b")}
    for name, value in new.items():
        assert_close(found[name], value, bound=3e-5)
    there = {**new, "m": start["m"]}
    upper = gradient64(there, held_out, w)
    v = {n: upper[n] for n in new}
    size = 0.01 / np.sqrt(sum(np.square(one).sum() for one in v.values()))
    sides = [
        gradient64({**{n: new[n] + s * v[n] for n in new}, "m": start["m"]}, rows, w)
        for s in (size, -size)
    ]
    second = (sides[0]["m"] - sides[1]["m"]) / (2 * size)
    moved = (start["m"] - found["m"]) / RATE
    assert np.linalg.norm(RATE * second) > 0.05 * np.linalg.norm(upper["m"])
    assert_close(moved, upper["m"] - RATE * second, bound=1e-4)


def test_batches_of_an_update_count_by_their_targets(data: list[Data]) -> None:
    """Two batches of a window are one batch of both."""
    few, many = (
        [[(x[:2], y[:2]), (x[2:], y[2:])] for x, y in data],
        [[one] for one in data],
    )
    results = []
    for rows, held_out in (few, many):
        model = One()
        stepper = stepper_for(model, held_out)
        stepper.apply(stepper.gradient([batch(one) for one in rows]))
        results.append(flat(model))
    for name, value in results[0].items():
        assert_close(value, results[1][name], bound=1e-4)


def test_a_bad_held_out_batch_leaves_the_magnitudes(
    data: list[Data], caplog: pytest.LogCaptureFixture
) -> None:
    for value in (np.nan, 1e30):  # no target; a loss that is not finite
        model = One()
        before = flat(model)
        x, y = data[1]
        stepper = stepper_for(model, [(x, np.full_like(y, value))])
        with caplog.at_level(logging.WARNING):
            stepper.apply(stepper.gradient([batch(data[0])]))
        after = flat(model)
        assert np.array_equal(after["m"], before["m"])
        assert not np.array_equal(after["lora_b"], before["lora_b"])
        assert np.isfinite(after["lora_b"]).all()
        assert "magnitudes stay: no finite gradient" in caplog.text
        caplog.clear()


def test_each_optimizer_keeps_its_own_moments() -> None:
    model = One()
    optimizer = BilevelStepper.make_optimizer(TrainConfig(optimizer="adam"))
    assert isinstance(optimizer, optim.MultiOptimizer)
    optimizer.init(model.trainable_parameters())
    magnitudes, others = (dict(tree_flatten(one.state)) for one in optimizer.optimizers)
    assert {n.split(".")[1] for n in magnitudes if n.startswith("layer")} == {"m"}
    assert {n.split(".")[1] for n in others if n.startswith("layer")} == {
        "lora_a",
        "lora_b",
    }
    assert all(isinstance(one, optim.Adam) for one in optimizer.optimizers)


def test_rows_are_split_by_the_seed() -> None:
    data = [([1, n, 2], 0) for n in range(50)]
    parts = [BilevelStepper.levels(data, TrainConfig(seed=seed)) for seed in (0, 0, 1)]
    told = [
        [
            [one[0][1] for one in map(half.__getitem__, range(len(half)))]
            for half in part
        ]
        for part in parts
    ]
    assert told[0] == told[1] != told[2]
    lower, upper = told[0]
    assert (len(lower), len(upper)) == (40, 10)
    assert sorted([*lower, *upper]) == list(range(50))


def test_each_level_sees_its_own_rows(run: Run) -> None:
    """Other held-out rows change m alone in a step, other rows at first A and B."""
    lower, upper = BilevelStepper.levels(EXAMPLES, TrainConfig(magnitude_share=0.4))
    held = [upper[index] for index in range(len(upper))]
    settings = {"variant": "bidora", "magnitude_share": 0.4, "iters": 1}
    _, one = run("one", **settings)
    changed = [
        ([1, *range(40, 60), 2], 1) if example in held else example
        for example in EXAMPLES
    ]
    _, two = run("two", **settings, data=changed)
    ours, theirs = tensors(one.adapter_path), tensors(two.adapter_path)
    same = {name for name in ours if mx.array_equal(ours[name], theirs[name])}
    assert same == {name for name in ours if not name.endswith(".m")}
    assert len(lower) == len(EXAMPLES) - len(held)
    with pytest.raises(DoRAError, match="training data was"):
        run("one", **{**settings, "iters": 2}, data=changed, resume=True)


def test_batches_of_ones_own_are_made_for_each_level(run: Run) -> None:
    told = []

    def make(data: Any, size: int, limit: int, *, seed: int, counts: Any) -> Any:
        told.append(len(data))
        yield from Schedule(data, size, limit, seed=seed, counts=counts).batches()

    _, one = run("one", variant="bidora")
    _, two = run("two", variant="bidora", options={"batches": make})
    assert told == [10, 2]
    assert same_bits(tensors(one.adapter_path), tensors(two.adapter_path))


def test_what_cannot_be_split_is_refused(run: Run, tmp_path: Any) -> None:
    for share in (0.0, 1.0, 1, "half"):
        with pytest.raises(
            DoRAError, match=r"magnitude_share must .*above 0 and below 1"
        ):
            TrainConfig(magnitude_share=share)  # pyright: ignore[reportArgumentType]
    for share, count in ((0.01, 0), (0.99, 12)):
        with pytest.raises(DoRAError, match=rf"share {share} of 12 rows is {count}\."):
            run(variant="bidora", magnitude_share=share)
    assert not list(tmp_path.iterdir())
