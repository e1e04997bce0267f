"""Every loss, its gradients and its metrics against float64 NumPy."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_dora.data.batches import unit_batch
from mlx_dora.data.dataset import RowDataset
from mlx_dora.train.objectives.config import PreferenceConfig
from mlx_dora.train.objectives.dpo import Dpo
from mlx_dora.train.objectives.dpo_losses import (
    BY_SCORES,
    DIVERGENCES,
    LOSSES,
    PairTerms,
)
from mlx_dora.train.objectives.kto import Kto, kto_losses
from mlx_dora.train.objectives.orpo import Orpo, odds_ratio
from mlx_dora.train.objectives.simpo import Simpo, simpo_losses
from tests.checks import assert_close
from tests.train.objectives import oracle
from tests.train.objectives.oracle import BETA, GAMMA, SMOOTHING, TAU, Model, Twin

RANDOM = np.random.default_rng(5)
CHOSEN, REJECTED = RANDOM.normal(0, 3, (2, 7))
ODDS = RANDOM.normal(0, 5, 7)  # of the reference
COUNTS = RANDOM.integers(2, 9, (2, 7)).astype(np.float64)


def single(value: Any) -> mx.array:
    return mx.array(np.asarray(value, np.float32))


@pytest.mark.parametrize(
    ("name", "kind", "alpha"),
    [(name, "reverse_kl", 0.5) for name in LOSSES]
    + [(name, kind, 0.5) for name in BY_SCORES for kind in DIVERGENCES][1:]
    + [("sigmoid", "alpha_divergence", alpha) for alpha in (0.0, 1.0, 1.5)],
)
def test_a_loss_of_dpo_and_its_slopes_equal_numpy(
    name: str, kind: str, alpha: float
) -> None:
    def loss(chosen: mx.array, rejected: mx.array) -> mx.array:
        counts = [single(count) for count in COUNTS]
        terms = PairTerms(
            chosen=chosen,
            rejected=rejected,
            chosen_count=counts[0],
            rejected_count=counts[1],
            cross_entropy=mx.array(2.5),
            beta=BETA,
            label_smoothing=SMOOTHING,
            discopop_tau=TAU,
            reference=single(ODDS),
            divergence=kind,
            alpha=alpha,
        )
        return LOSSES[name](terms)

    def true(chosen: np.ndarray, rejected: np.ndarray) -> np.ndarray:
        own = chosen, rejected, COUNTS[0], COUNTS[1], 2.5
        return oracle.dpo(name, *own, ODDS, kind, alpha)

    given = single(CHOSEN), single(REJECTED)
    assert_close(loss(*given), true(CHOSEN, REJECTED))
    slopes = mx.grad(lambda c, r: loss(c, r).sum(), argnums=(0, 1))(*given)
    of_chosen = oracle.slope(lambda c: true(c, REJECTED).sum(), CHOSEN)
    of_rejected = oracle.slope(lambda r: true(CHOSEN, r).sum(), REJECTED)
    for slope, expected in zip(slopes, (of_chosen, of_rejected), strict=True):
        if name == "sft":  # its gradient is that of the scalar cross-entropy
            assert not np.array(slope).any()
        else:
            assert_close(slope, expected)


@pytest.mark.parametrize("name", Kto.loss_types)
def test_a_loss_of_kto_and_its_slopes_equal_numpy(name: str) -> None:
    desirable = np.array([True, False, False, True, True, False, True])

    def loss(ratios: mx.array) -> mx.array:
        return kto_losses(
            ratios,
            mx.array(desirable),
            mx.array(0.4),
            loss_type=name,
            beta=BETA,
            desirable_weight=1.3,
            undesirable_weight=0.8,
        )

    expected = oracle.kto(name, CHOSEN, desirable, 0.4)
    assert_close(loss(single(CHOSEN)), expected)
    slope = mx.grad(lambda x: loss(x).sum())(single(CHOSEN))
    assert_close(
        slope, oracle.slope(lambda x: oracle.kto(name, x, desirable, 0.4).sum(), CHOSEN)
    )


def test_the_odds_ratio_and_its_slopes_equal_numpy() -> None:
    chosen = np.array([-9.0, -2.0, -0.7, -0.69, -0.1, -1e-3])
    rejected = chosen[::-1].copy()
    assert_close(
        odds_ratio(single(chosen), single(rejected)),
        oracle.odds_ratio(chosen, rejected),
    )
    slope = mx.grad(lambda c: odds_ratio(c, single(rejected)).sum())(single(chosen))
    assert_close(slope, 1 + np.exp(chosen) / (1 - np.exp(chosen)))


def test_a_loss_of_simpo_and_its_slopes_equal_numpy() -> None:
    def loss(chosen: mx.array) -> mx.array:
        return simpo_losses(
            chosen,
            single(REJECTED),
            beta=2.0,
            gamma=GAMMA,
            label_smoothing=SMOOTHING,
        )

    def true(chosen: np.ndarray) -> np.ndarray:
        margin = 2.0 * (chosen - REJECTED) - GAMMA
        right, wrong = oracle.log_sigmoid(margin), oracle.log_sigmoid(-margin)
        return -(1 - SMOOTHING) * right - SMOOTHING * wrong

    assert_close(loss(single(CHOSEN)), true(CHOSEN))
    slope = mx.grad(lambda c: loss(c).sum())(single(CHOSEN))
    assert_close(slope, oracle.slope(lambda c: true(c).sum(), CHOSEN))


class Examples(RowDataset):
    """Random rows; in every unit of two, prompts are equal. Labels alternate."""

    def __init__(self, count: int = 6) -> None:
        random = np.random.default_rng(1)
        self._rows, prompt = [], [0]
        for index in range(count):
            if index % 2 == 0:
                prompt = random.integers(1, 40, random.integers(2, 5)).tolist()
            answer = random.integers(1, 40, random.integers(2, 8)).tolist()
            self._rows.append(([*prompt, *answer], len(prompt)))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int, /) -> Any:
        return self._rows[index]

    def label(self, index: int) -> bool:
        return index % 3 == 0


class Case:
    """An objective on a batch of `Model`, and the same in NumPy."""

    def __init__(self, objective: Any, starts: list[int]) -> None:
        self.data, self.model = Examples(), Model()
        self.twin, self.objective = Twin(self.model), objective
        batch = unit_batch(self.data, starts, objective.unit, 64)
        self.batch = objective.complete(self.model, self.data, batch)
        rows = [self.data[i] for i in np.array(batch[2]).tolist() if i >= 0]
        self.tokens, self.lengths = np.array(batch[0]), [len(t) for t, _ in rows]
        self.firsts = [first for _, first in rows]
        kept = np.array(batch[2]) >= 0
        self.kept = kept[: len(kept) // objective.unit]
        steps = np.arange(1, self.tokens.shape[1])
        self.tokens = self.tokens[kept]
        ends = np.array(self.lengths)[:, None]
        self.answers = (steps >= np.array(self.firsts)[:, None]) & (steps < ends)
        self.whole = steps < ends

    def total(self, adapter: Any, mask: np.ndarray | None = None) -> np.ndarray:
        mask = self.answers if mask is None else mask
        return (self.twin.each(self.tokens, adapter) * mask).sum(1)

    def check(self, true: Callable[[Any], float]) -> dict[str, float]:
        """Compare loss and gradient of the adapter; return the metrics."""
        function = nn.value_and_grad(self.model, self.objective.loss)
        (loss, count, tokens, table), gradient = function(self.model, *self.batch)
        assert int(count) == self.kept.sum()
        assert_close(loss, np.array(true(self.twin.adapter)))
        found = gradient["model"]["layers"][0]
        for name, value in self.twin.adapter.items():
            expected = oracle.slope(
                lambda v, n=name: true({**self.twin.adapter, n: v}), value
            )
            assert_close(found[name], expected, bound=2e-5)
        self.targets = int(tokens)
        flat = np.array(table, np.float64).reshape(-1).tolist()
        return self.objective.values(flat)


@pytest.mark.parametrize("starts", [[0, 2, 4], [2, -1, 0]], ids=["full", "filled up"])
@pytest.mark.parametrize("name", [*LOSSES, "sigmoid,sft"])
def test_dpo_trains_the_adapter_as_numpy_does(name: str, starts: list[int]) -> None:
    types = tuple(name.split(","))
    weights = (1.0, 0.4)[: len(types)]
    config = PreferenceConfig(
        beta=BETA,
        loss_type=types,
        loss_weights=weights,
        label_smoothing=SMOOTHING,
        discopop_tau=TAU,
    )
    case = Case(Dpo(config), starts)
    counts = case.answers.sum(1)
    half = len(counts) // 2

    def ratios(adapter: Any) -> np.ndarray:
        return case.total(adapter) - case.total(None)

    def true(adapter: Any) -> float:
        x = ratios(adapter)
        entropy = -case.total(adapter)[:half].sum() / counts[:half].sum()
        odds = case.total(None)[:half] - case.total(None)[half:]
        own = x[:half], x[half:], counts[:half], counts[half:], entropy, odds
        parts = [w * oracle.dpo(n, *own) for n, w in zip(types, weights, strict=True)]
        return float(np.sum(parts, axis=0).mean())

    metrics = case.check(true)
    assert case.targets == counts.sum()
    x = BETA * ratios(case.twin.adapter)
    chosen, rejected = x[:half], x[half:]
    logps = case.total(case.twin.adapter)
    expected = {
        "rewards/chosen": chosen.mean(),
        "rewards/rejected": rejected.mean(),
        "rewards/accuracies": (chosen > rejected).mean(),
        "rewards/margins": (chosen - rejected).mean(),
        "logps/chosen": logps[:half].mean(),
        "logps/rejected": logps[half:].mean(),
    }
    assert metrics == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("starts", [[0, 2, 4], [2, -1, 0]], ids=["full", "filled up"])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_the_tail_of_the_longer_answer_is_weighted(
    alpha: float, starts: list[int]
) -> None:
    case = Case(Dpo(PreferenceConfig(beta=BETA, ld_alpha=alpha)), starts)
    counts = case.answers.sum(1)
    half = len(counts) // 2
    assert (counts[:half] != counts[half:]).any()
    shorter = np.minimum(counts[:half], counts[half:])
    is_tail = np.cumsum(case.answers, axis=1) > np.tile(shorter, 2)[:, None]
    weights = np.where(is_tail, alpha, 1.0) * case.answers

    def true(adapter: Any) -> float:
        x = case.total(adapter, weights) - case.total(None, weights)
        return float(-oracle.log_sigmoid(BETA * (x[:half] - x[half:])).mean())

    metrics = case.check(true)
    logps = case.total(case.twin.adapter, weights)
    assert metrics["logps/chosen"] == pytest.approx(logps[:half].mean(), rel=1e-5)


@pytest.mark.parametrize("starts", [[0, 1, 2, 4, 5], [1, -1, 0, 3]])
@pytest.mark.parametrize("name", Kto.loss_types)
def test_kto_trains_the_adapter_as_numpy_does(name: str, starts: list[int]) -> None:
    config = PreferenceConfig(
        beta=BETA, loss_type=(name,), desirable_weight=1.3, undesirable_weight=0.8
    )
    case = Case(Kto(config), starts)
    places = [start for start in starts if start >= 0]
    desirable = np.array([case.data.label(place) for place in places])
    twin, kl = case.twin, 0.0
    for place, before in zip(places, [places[-1], *places[:-1]], strict=True):
        (own, first), (other, start) = case.data[place], case.data[before]
        mixed = np.array([[*own[:first], *other[start:]]])
        pair = [twin.each(mixed, a)[0, first - 1 :].sum() for a in (twin.adapter, None)]
        kl += (pair[0] - pair[1]) / len(places)
    kl = max(kl, 0) if name == "kto" else 0.0

    def ratios(adapter: Any) -> np.ndarray:
        return case.total(adapter) - case.total(None)

    metrics = case.check(
        lambda adapter: float(oracle.kto(name, ratios(adapter), desirable, kl).mean())
    )
    x, logps = BETA * ratios(twin.adapter), case.total(twin.adapter)
    expected = {
        "rewards/chosen": x[desirable].mean(),
        "rewards/rejected": x[~desirable].mean(),
        "rewards/margins": x[desirable].mean() - x[~desirable].mean(),
        "logps/chosen": logps[desirable].mean(),
        "logps/rejected": logps[~desirable].mean(),
        "kl": kl,
    }
    assert metrics == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("starts", [[0, 2, 4], [2, -1, 0]], ids=["full", "filled up"])
def test_orpo_trains_the_adapter_as_numpy_does(starts: list[int]) -> None:
    case = Case(Orpo(PreferenceConfig(beta=BETA)), starts)
    half = len(case.answers) // 2

    def means(adapter: Any) -> np.ndarray:
        return case.total(adapter) / case.answers.sum(1)

    def entropy(adapter: Any) -> float:
        total = case.total(adapter, case.whole)[:half].sum()
        return -total / case.whole[:half].sum()

    def odds(adapter: Any) -> np.ndarray:
        x = means(adapter)
        return oracle.odds_ratio(x[:half], x[half:])

    def true(adapter: Any) -> float:
        return entropy(adapter) - BETA * oracle.log_sigmoid(odds(adapter)).mean()

    metrics = case.check(true)
    x = odds(case.twin.adapter)
    assert metrics["nll_loss"] == pytest.approx(entropy(case.twin.adapter), rel=1e-5)
    assert metrics["log_odds_chosen"] == pytest.approx(x.mean(), rel=1e-5)
    assert metrics["log_odds_ratio"] == pytest.approx(
        oracle.log_sigmoid(x).mean(), rel=1e-5
    )


@pytest.mark.parametrize("starts", [[0, 2, 4], [2, -1, 0]], ids=["full", "filled up"])
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_simpo_trains_the_adapter_as_numpy_does(
    alpha: float, starts: list[int]
) -> None:
    config = PreferenceConfig(
        beta=2.0, simpo_gamma=GAMMA, cpo_alpha=alpha, label_smoothing=SMOOTHING
    )
    case = Case(Simpo(config), starts)
    counts = case.answers.sum(1)
    half = len(counts) // 2

    def true(adapter: Any) -> float:
        total = case.total(adapter)
        mean = total / counts
        margin = 2.0 * (mean[:half] - mean[half:]) - GAMMA
        right, wrong = oracle.log_sigmoid(margin), oracle.log_sigmoid(-margin)
        losses = -(1 - SMOOTHING) * right - SMOOTHING * wrong
        return float(losses.mean() - alpha * total[:half].sum() / counts[:half].sum())

    metrics = case.check(true)
    entropy = -case.total(case.twin.adapter)[:half].sum() / counts[:half].sum()
    assert metrics["nll_loss"] == pytest.approx(entropy, rel=1e-5)
