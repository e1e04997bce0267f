"""Fisher information on disk, and as weights of rows."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_dora import DoRAError
from mlx_dora.merge.fisher.information import (
    Fisher,
    FisherFacts,
    check_fishers,
    check_paths,
    informed_weights,
    load_fisher,
    save_fisher,
)
from tests.checks import assert_close

FACTS = FisherFacts(granularity="row", labels="sampled", rows=2, tokens=9, norm=0.0)
TENSORS = {"a.proj": mx.array([3.0, 0.0]), "b.proj": mx.array([0.0, 4.0, 12.0])}


def test_a_folder_returns_the_information_over_its_norm(tmp_path: Path) -> None:
    facts = save_fisher(tmp_path / "f", FACTS, TENSORS.items(), inputs=())
    assert facts.norm == pytest.approx(13.0)
    result = load_fisher(tmp_path / "f")
    assert result.facts == facts
    assert result.paths == {"a.proj", "b.proj"}
    first = result.read("b.proj", (3, 7))
    assert first is not None
    assert_close(first, np.array([0.0, 4.0, 12.0]) / 13)
    assert result.read("c.proj", (3, 7)) is None
    with pytest.raises(DoRAError, match="already exists"):
        save_fisher(tmp_path / "f", FACTS, TENSORS.items(), inputs=())


def test_values_whose_squares_overflow(tmp_path: Path) -> None:
    large = {"a.proj": mx.array([3e30, 4e30])}
    assert save_fisher(
        tmp_path / "f", FACTS, large.items(), inputs=()
    ).norm == pytest.approx(5e30)


def test_other_folders_are_refused(tmp_path: Path) -> None:
    save_fisher(tmp_path / "f", FACTS, TENSORS.items(), inputs=())
    facts = tmp_path / "f" / "fisher.json"
    content = json.loads(facts.read_text())
    no_norm, other = {**content, "norm": 0}, {**content, "granularity": "cell"}
    for text in ("{", "[]", '{"rows": 1}', json.dumps(no_norm), json.dumps(other)):
        facts.write_text(text)
        reason = "is damaged or was edited|is not JSON|must hold a JSON object"
        with pytest.raises(DoRAError, match=reason) as caught:
            load_fisher(tmp_path / "f")
        assert "\n" not in str(caught.value)
    facts.unlink()
    with pytest.raises(DoRAError, match=r"has no fisher\.json"):
        load_fisher(tmp_path / "f")


def test_zero_information_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(DoRAError, match="gives no information"):
        save_fisher(tmp_path / "f", FACTS, {"a": mx.zeros(3)}.items(), inputs=())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("tensor", "shape", "message"),
    [
        (mx.ones(3), (4, 3), r"has shape \(3,\); the weight needs \(4,\)"),
        (mx.ones((4, 3)), (4, 3), "the weight needs"),
        (mx.array([1.0, -1.0]), (2, 3), "NaN, inf or negative"),
        (mx.array([1.0, float("nan")]), (2, 3), "NaN"),
    ],
)
def test_information_that_does_not_fit_is_refused(tensor, shape, message) -> None:
    result = Fisher(FisherFacts(**{**vars(FACTS), "norm": 1.0}), {"a": tensor})
    with pytest.raises(DoRAError, match=message):
        result.read("a", shape)


def test_mismatched_estimates_are_refused() -> None:
    first = Fisher(FACTS, TENSORS)
    other = Fisher(FisherFacts(**{**vars(FACTS), "granularity": "element"}), {})
    assert check_fishers("slerp", None, 2) == []
    assert check_fishers("fisher", [first, first], 2) == [first, first]
    for given, message in (
        (None, "needs 2 estimates"),
        ([first], "got 1"),
        ([first, other], "element and row"),
    ):
        with pytest.raises(DoRAError, match=message):
            check_fishers("fisher", given, 2)
    with pytest.raises(DoRAError, match="slerp does not use Fisher"):
        check_fishers("slerp", [first, first], 2)
    with pytest.raises(DoRAError, match=r"no such modules in the model: b\.proj"):
        check_paths([first], ["a.proj"])


def test_weights_of_rows() -> None:
    weights = np.array([[0.25, 0.75]] * 3)
    known = [mx.array([1.0, 2.0, 0.0]), mx.array([1.0, 0.0, 0.0])]
    result, unknown = informed_weights(weights, known)
    assert unknown == 1
    np.testing.assert_allclose(result, [[0.25, 0.75], [1, 0], [0.25, 0.75]])


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("rows", "2", "rows is '2'"),
        ("tokens", -1, "tokens is -1"),
        ("norm", float("nan"), "norm is nan"),
        ("norm", float("inf"), "norm is inf"),
        ("norm", [], r"norm is \[\]"),
        ("labels", ["data"], r"labels is \['data'\]"),
        ("model", 5, "model is 5"),
        ("strange", 5, "strange is unknown"),
        ("norm", None, "norm is None"),
    ],
)
def test_each_fact_is_checked(
    tmp_path: Path, name: str, value: object, reason: str
) -> None:
    save_fisher(tmp_path / "f", FACTS, TENSORS.items(), inputs=())
    facts = tmp_path / "f" / "fisher.json"
    facts.write_text(json.dumps({**json.loads(facts.read_text()), name: value}))
    with pytest.raises(DoRAError, match=reason):
        load_fisher(tmp_path / "f")
