"""Rules for magnitudes against their definitions in float64."""

from typing import Any

import numpy as np
import pytest

from mlx_dora.errors import DoRAError
from mlx_dora.merge.methods.lengths import Lengths, ruled
from mlx_dora.merge.methods.magnitudes import RULES, rule_named
from tests.checks import assert_close
from tests.merge.methods.test_elementwise import ties_truth

ROWS, COUNT = 200, 3


def make(**changed: Any) -> Lengths:
    rng = np.random.default_rng(0)
    base = rng.uniform(1, 2, ROWS)
    values: dict[str, Any] = {
        "base": base,
        "inputs": base[:, None] * (1 + 0.1 * rng.standard_normal((ROWS, COUNT))),
        "weights": np.tile([1.0, 0.5, 2.0], (ROWS, 1)),
        "own": rng.uniform(1, 2, ROWS),
        **changed,
    }
    return Lengths(**values)


def test_mean_is_the_weighted_mean() -> None:
    lengths = make()
    truth = (lengths.inputs * lengths.weights).sum(1) / 3.5
    assert_close(ruled("mean", lengths), truth, bound=1e-12)


def test_a_negative_weight_takes_a_change_away() -> None:
    inputs = make().inputs[:, :2]
    lengths = make(inputs=inputs, weights=np.tile([1.0, -1.0], (ROWS, 1)))
    moved = inputs - lengths.base[:, None]
    truth = lengths.base + (moved[:, 0] - moved[:, 1]) / 2
    assert_close(ruled("mean", lengths), truth, bound=1e-12)
    furthest = np.where(
        np.abs(moved[:, 0]) >= np.abs(moved[:, 1]), moved[:, 0], -moved[:, 1]
    )
    assert_close(ruled("mover", lengths), lengths.base + furthest, bound=1e-12)


def test_mover_takes_the_length_of_the_adapter_that_moved_it_most() -> None:
    lengths = make()
    result = ruled("mover", lengths)
    for j in range(ROWS):
        size = lengths.weights[j] * np.abs(lengths.inputs[j] - lengths.base[j])
        assert result[j] == pytest.approx(lengths.inputs[j][size.argmax()], rel=1e-12)


@pytest.mark.parametrize("density", [None, 0.5, 1.0])
def test_ties_trims_and_elects_the_changes_as_one_vector(density: float | None) -> None:
    lengths = make()
    moved = list((lengths.inputs - lengths.base[:, None]).T)
    share = 0.2 if density is None else density
    truth = ties_truth(moved, [1.0, 0.5, 2.0], [share] * COUNT, True)
    assert_close(ruled("ties", lengths, density), lengths.base + truth, bound=1e-6)


def test_base_and_own_copy_lengths() -> None:
    lengths = make()
    assert (ruled("base", lengths) == lengths.base).all()
    assert (ruled("own", lengths) == lengths.own).all()


@pytest.mark.parametrize("rule", RULES)
def test_lengths_are_never_negative_and_zero_rows_stay_zero(rule: str) -> None:
    own = make().own
    own[3] = 0.0
    base = make().base
    base[4] = 0.0
    weights = np.tile([3.0, -3.0, 0.1], (ROWS, 1))
    inputs = make().inputs * [0.1, 3.0, 1.0]
    result = ruled(rule, make(own=own, base=base, inputs=inputs, weights=weights))
    assert (result >= 0).all()
    assert result[3] == 0
    assert np.isfinite(result).all()


@pytest.mark.parametrize("rule", [r for r in RULES if r not in ("base", "own")])
def test_equal_magnitudes_come_back(rule: str) -> None:
    inputs = np.repeat(make().inputs[:, :1], COUNT, axis=1)
    result = ruled(rule, make(inputs=inputs), 1.0)
    assert_close(result, inputs[:, 0], bound=1e-7)


def test_most_weight_decides_the_sign() -> None:
    lengths = make()
    inputs = lengths.inputs
    inputs[0] *= [-1, -1, 1]  # weight 1.5 of 3.5
    inputs[1] *= [1, 1, -1]
    sign = make(inputs=inputs).sign
    assert (sign[0], sign[1]) == (1, -1)
    assert (sign[2:] == 1).all()


def test_bad_rules_are_refused() -> None:
    with pytest.raises(DoRAError, match="no rule for magnitudes 'best': mean, mover"):
        rule_named("best")
    weights = make().weights
    weights[0, 0] = 2.0
    with pytest.raises(DoRAError, match="ties needs one weight per adapter"):
        ruled("ties", make(weights=weights))
