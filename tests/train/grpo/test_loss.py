"""GRPO's loss and its gradient, against float64 NumPy."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_dora.train.grpo.config import RewardConfig
from mlx_dora.train.grpo.loss import policy_loss
from tests.checks import assert_close

LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo")
ROWS, LENGTH = 5, 7
Arrays = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def given() -> Arrays:
    random = np.random.default_rng(0)
    logps = -random.gamma(2.0, size=(ROWS, LENGTH))
    lengths = np.array([7, 1, 4, 6, 0])
    return {
        "logps": logps,
        "old": logps + random.normal(scale=0.4, size=logps.shape),
        "reference": logps + random.normal(scale=0.3, size=logps.shape),
        "advantages": random.normal(size=ROWS) * 2,
        "mask": np.arange(LENGTH) < lengths[:, None],
    }


def expected(given: Arrays, c: RewardConfig) -> tuple[float, np.ndarray, float, float]:
    """Loss, gradient, KL and share of clipped ratios, written out."""
    mask, gain = given["mask"], given["advantages"][:, None]
    count = np.maximum(mask.sum(1, keepdims=True), 1)
    gap = np.where(mask, given["logps"] - given["old"], 0)
    if c.importance_sampling_level == "sequence":
        gap = np.broadcast_to(gap.sum(1, keepdims=True) / count, gap.shape)
    ratio = np.exp(gap)
    low, high = (
        1 - c.epsilon,
        1 + (c.epsilon if c.epsilon_high is None else c.epsilon_high),
    )
    first = np.minimum(ratio, np.inf if c.delta is None else c.delta) * gain
    second = np.clip(ratio, low, high) * gain
    losses = -np.minimum(first, second)
    # d ratio / d log-probability is the ratio; a clipped ratio is constant.
    moves_first = ratio < (np.inf if c.delta is None else c.delta)
    moves = np.where(first <= second, moves_first, (ratio > low) & (ratio < high))
    slope_of_gap = -ratio * gain * moves
    slope = np.zeros_like(losses)
    kl = 0.0
    if c.beta:
        d = np.where(mask, given["reference"] - given["logps"], 0)
        divergence = np.exp(d) - d - 1
        factor = ratio if c.use_bias_correction_kl else np.ones_like(ratio)
        losses = losses + c.beta * divergence * factor
        slope = c.beta * (1 - np.exp(d)) * factor
        if c.use_bias_correction_kl:
            slope_of_gap = slope_of_gap + c.beta * divergence * ratio
        kl = (divergence * factor * mask).sum() / mask.sum()
    weight = (
        mask
        / {
            "grpo": count * ROWS,
            "bnpo": mask.sum(),
            "dapo": mask.sum(),
            "dr_grpo": ROWS * c.max_completion_length,
        }[c.loss_type]
    )
    slope_of_gap = slope_of_gap * weight
    if c.importance_sampling_level == "sequence":
        slope_of_gap = slope_of_gap.sum(1, keepdims=True) / count * mask
    clipped = ((ratio < low) & (gain < 0)) | ((ratio > high) & (gain > 0))
    share = (
        clipped[:, 0].mean()
        if c.importance_sampling_level == "sequence"
        else clipped[mask].mean()
    )
    return (losses * weight).sum(), slope * weight + slope_of_gap, kl, float(share)


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"epsilon": 0.1, "epsilon_high": 0.28},
        {"delta": 1.3},
        {"beta": 0.4},
        {"beta": 0.4, "use_bias_correction_kl": False, "delta": 1.5},
        {"importance_sampling_level": "sequence", "beta": 0.1},
    ],
)
def test_loss_and_gradient(
    given: Arrays, loss_type: Any, settings: dict[str, Any]
) -> None:
    config = RewardConfig(loss_type=loss_type, max_completion_length=11, **settings)
    arrays = {name: mx.array(value.astype(np.float32)) for name, value in given.items()}
    logps = arrays.pop("logps")
    padding = mx.array(~given["mask"])  # what stands there must not matter
    arrays["old"] = mx.where(padding, -mx.inf, arrays["old"])

    def loss(logps: mx.array) -> mx.array:
        return policy_loss(logps, config=config, **arrays).value

    value, gradient = mx.value_and_grad(loss)(logps)
    wanted, slope, kl, clipped = expected(given, config)
    assert_close(value, np.array(wanted))
    assert_close(gradient, slope)
    found = policy_loss(logps, config=config, **arrays)
    assert found.count.item() == (18 if loss_type == "dapo" else ROWS)
    assert found.clipped.item() == pytest.approx(clipped, rel=1e-5)
    assert (found.kl is None) == (config.beta == 0)
    if found.kl is not None:
        assert found.kl.item() == pytest.approx(kl, rel=1e-5)


def test_the_ratio_is_1_under_the_policy_that_sampled(given: Arrays) -> None:
    config = RewardConfig(loss_type="bnpo")
    arrays = {name: mx.array(given[name]) for name in ("advantages", "mask")}

    def loss(logps: mx.array) -> mx.array:
        return policy_loss(logps, config=config, **arrays).value

    logps = mx.array(given["logps"].astype(np.float32))
    value, gradient = mx.value_and_grad(loss)(logps)
    mask = given["mask"]
    slope = -given["advantages"][:, None] * mask / mask.sum()
    assert_close(gradient, slope)
    assert_close(value, slope.sum())


@pytest.mark.parametrize("loss_type", LOSSES)
def test_a_batch_without_tokens_has_no_loss(given: Arrays, loss_type: Any) -> None:
    config = RewardConfig(loss_type=loss_type)
    logps = mx.array(given["logps"].astype(np.float32))
    gains = mx.array(given["advantages"].astype(np.float32))
    found = policy_loss(logps, gains, mx.zeros(logps.shape), config)
    assert found.value.item() == 0
    assert found.clipped.item() == 0
