"""mlx-lm's models: a handful on every run, all of them against docs/models.md."""

from pathlib import Path

import pytest

from tests.compat.model_table import outcomes, render
from tests.compat.put_through import put_through

PAGE = Path(__file__).parents[2] / "docs" / "models.md"


@pytest.mark.parametrize(
    ("name", "has_experts"),
    [
        ("gemma2", False),
        ("mamba", False),
        ("phi3", False),
        ("qwen3_5", True),
        ("deepseek_v3", True),
        ("gpt_oss", True),
        ("olmoe", True),
        ("qwen3_moe", True),
    ],
)
def test_a_model_comes_through(name: str, has_experts: bool) -> None:
    found = put_through(name)
    assert found.state == "works", found.reason
    assert bool(found.experts) == has_experts
    assert found.adapted > 3


@pytest.mark.slow
def test_the_page_says_what_happens() -> None:
    assert render(outcomes()) == PAGE.read_text(encoding="utf-8")
