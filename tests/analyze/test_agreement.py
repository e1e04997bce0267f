"""What a comparison of adapters says, from constructed agreements."""

import re

import numpy as np
import pytest

from mlx_dora.analyze.agreement import PairAgreement, comparison_advice
from mlx_dora.analyze.compare import AdapterComparison
from mlx_dora.analyze.table import comparison_lines


def agreement(name: str, first: int, second: int, cosine: float) -> PairAgreement:
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
        input_overlap=0.5,
        output_overlap=0.5,
        disturbs_first=0.3,
        disturbs_second=0.4,
        energy=1.0,
    )


def pairs_of(cosines: dict[tuple[int, int], float]) -> list[PairAgreement]:
    return [agreement("q_proj", *pair, cosine) for pair, cosine in cosines.items()]


def test_advice_on_three_names_the_two_that_agree() -> None:
    pairs = pairs_of({(0, 1): 0.98, (0, 2): 0.01, (1, 2): -0.03})
    method, groups = comparison_advice(pairs, ["a", "b", "c"], 0)
    assert "mean cosine +0.32, from -0.03 to +0.98" in method.sentence
    assert groups.rule == "groups"
    assert "b and c have cosine -0.03, a and b have cosine +0.98" in groups.sentence
    assert "a with b; c." in groups.sentence


def test_groups_join_through_a_common_member() -> None:
    cosines = {(0, 1): 0.9, (2, 3): 0.9, (0, 2): 0.0, (0, 3): 0.0, (1, 2): 0.3}
    (_, groups) = comparison_advice(pairs_of({**cosines, (1, 3): 0.0}), "abcd", 0)
    assert "a with b with c with d." in groups.sentence


def test_pairs_of_one_kind_need_no_groups() -> None:
    pairs = pairs_of({(0, 1): 0.5, (0, 2): 0.6, (1, 2): 0.7})
    assert [a.rule for a in comparison_advice(pairs, "abc", 0)] == ["agree"]
    (alone,) = comparison_advice(pairs_of({(0, 1): 0.5}), "ab", 0)
    assert "(cosine +0.50)" in alone.sentence


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
