"""What a comparison of adapters says, from constructed agreements."""

import re

import numpy as np
import pytest

from mlx_dora.analyze.agreement import PairAgreement, comparison_advice
from mlx_dora.analyze.compare import AdapterComparison
from mlx_dora.analyze.guidance import INDEPENDENT, SPACE, STRONG, Advice
from mlx_dora.analyze.table import comparison_lines


def agreement(
    name: str, first: int, second: int, cosine: float, size: float = 0.01
) -> PairAgreement:
    """Return a pair of adapters on one matrix with this cosine."""
    return PairAgreement(
        name=name,
        first=first,
        second=second,
        update_cosine=cosine,
        row_update_cosine=np.full(4, cosine),
        direction_cosine=0.99,
        delta_m_correlation=0.1,
        sign_conflict=0.25,
        size_ratio=1.0,
        relative_size=size,
        input_overlap=0.5,
        output_overlap=0.5,
        disturbs_first=0.3,
        disturbs_second=0.4,
        energy=1.0,
    )


def pairs_of(cosines: dict[tuple[int, int], float]) -> list[PairAgreement]:
    return [agreement("q_proj", *pair, cosine) for pair, cosine in cosines.items()]


def advice(cosines: dict[tuple[int, int], float], names: str) -> Advice:
    return comparison_advice(pairs_of(cosines), [*names], 0)[0]


def test_a_third_adapter_is_not_hidden_by_two_that_agree() -> None:
    method = advice({(0, 1): 0.98, (0, 2): 0.01, (1, 2): -0.03}, "abc")
    assert (method.rule, method.method) == ("groups", INDEPENDENT)
    assert "b and c have cosine -0.03, a and b cosine +0.98" in method.sentence
    assert "a with b; c:" in method.sentence
    assert method.weights == (1.0,) * 3


def test_groups_join_through_a_common_member() -> None:
    cosines = {(0, 1): 0.9, (2, 3): 0.9, (0, 2): 0.0, (0, 3): 0.0, (1, 3): 0.0}
    apart = advice({**cosines, (1, 2): 0.4}, "abcd")
    assert "a with b; c with d:" in apart.sentence
    joined = advice({**cosines, (1, 2): 0.6}, "abcd")
    assert (joined.rule, joined.method) == ("agree", "karcher")
    assert joined.weights == (0.25,) * 4


def test_a_single_group_gets_a_mean() -> None:
    assert advice({(0, 1): 0.5, (0, 2): 0.6, (1, 2): 0.7}, "abc").method == "karcher"
    two = advice({(0, 1): 0.5}, "ab")
    assert (two.method, two.weights) == ("slerp", (0.5, 0.5))
    assert "(cosine +0.50)" in two.sentence


def test_independent_adapters_are_added_whole() -> None:
    four = advice({(i, k): 0.1 for i in range(4) for k in range(i + 1, 4)}, "abcd")
    assert (four.rule, four.weights) == ("independent", (1.0,) * 4)
    assert (four.method, four.space) == (INDEPENDENT, SPACE)


def test_large_updates_get_a_mean() -> None:
    def rule(size: float) -> Advice:
        pairs = [agreement("q_proj", 0, 1, 0.1, size)]
        return comparison_advice(pairs, ["a", "b"], 0)[0]

    assert rule(STRONG - 1e-6).rule == "independent"
    strong = rule(STRONG)
    assert (strong.rule, strong.method) == ("strong", "slerp")
    assert strong.weights == (0.5, 0.5)
    assert "2.0% of the weights" in strong.sentence


def test_a_single_opposed_pair_suggests_no_method() -> None:
    opposed = advice({(0, 1): 0.9, (0, 2): 0.0, (1, 2): -0.3}, "abc")
    assert (opposed.rule, opposed.method) == ("opposed", None)
    assert "b and c oppose each other (cosine -0.30)" in opposed.sentence


def test_a_suggested_method_is_to_be_tested() -> None:
    rules = [a.rule for a in comparison_advice(pairs_of({(0, 1): 0.0}), "ab", 4)]
    assert rules == ["independent", "rank", "test"]
    rules = [a.rule for a in comparison_advice(pairs_of({(0, 1): -0.9}), "ab", 4)]
    assert rules == ["opposed", "rank"]


@pytest.mark.parametrize(
    ("paths", "labels"),
    [
        (["/runs/a", "/runs/b"], ["a", "b"]),
        (["/x/adapter", "/y/adapter"], ["x/adapter", "y/adapter"]),
        (["/x/a", "/x/a"], ["a (1)", "a (2)"]),
        (["adapter 1", "."], ["adapter 1", "."]),
    ],
)
def test_labels_are_the_ends_of_paths_that_differ(
    paths: list[str], labels: list[str]
) -> None:
    pairs = pairs_of({(0, 1): 0.5})
    assert (
        AdapterComparison(
            adapters=paths, adapter_ranks=[8, 8], pairs=pairs, ranks={}
        ).labels
        == labels
    )


def test_the_table_shows_the_most_opposed_rows_and_counts_the_others() -> None:
    pairs = [
        agreement(f"model.layers.{i}.self_attn.q_proj", 0, 1, i / 100)
        for i in range(29, -1, -1)
    ]
    comparison = AdapterComparison(
        adapters=["a", "b"], adapter_ranks=[8, 8], pairs=pairs, ranks={}
    )
    lines = comparison_lines(comparison, top=12)
    rows = [m[1] for m in map(re.compile(r"(\d+)\.self_attn").search, lines) if m]
    assert rows == [*map(str, range(12))]
    assert any(line.startswith("and 18 more") for line in lines)
