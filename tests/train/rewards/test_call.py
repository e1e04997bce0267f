import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_dora.errors import DoRAError
from mlx_dora.train.grpo.config import RewardConfig
from mlx_dora.train.rewards import Reward, check_columns, load_rewards, score

MODULE = """
def length(completions, **columns):
    return [len(text) for text in completions]

def column(prompts, answer, bonus=0):
    return [None if value is None else value + bonus for value in answer]

def ids(completion_ids):
    return [len(tokens) for tokens in completion_ids]

def raising(prompts, **columns):
    return [1 / (prompt != "bad") for prompt in prompts]

def only_together(prompts, **columns):
    return [1 / (len(prompts) == 1) for _ in prompts]

def short(prompts, **columns):
    return [1.0]

value = 3
"""
FACTS: dict[str, Any] = {
    "prompts": ["good", "bad"],
    "completions": ["abc", "d"],
    "completion_ids": [[1, 2], [3]],
    "columns": {"answer": [2.5, None]},
}


@pytest.fixture(autouse=True)
def own_rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_rewards.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "own_rewards", raising=False)


def rewards(*names: str, **arguments: dict[str, Any]) -> list[Reward]:
    given = {f"own_rewards.{name}": value for name, value in arguments.items()}
    names = tuple(f"own_rewards.{name}" for name in names)
    return load_rewards(RewardConfig(reward_funcs=names, reward_arguments=given))


def test_functions_of_the_current_folder_get_what_they_take() -> None:
    loaded = rewards("length", "column", "ids", column={"bonus": 1})
    expected = np.array([[3, 3.5, 2], [1, math.nan, 1]])
    np.testing.assert_array_equal(score(loaded, **FACTS), expected)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (
            "raising",
            "^reward own_rewards.raising failed: ZeroDivisionError: .*, for the prompt "
            "'bad'.$",
        ),
        (
            "only_together",
            "when called with all prompts of a batch, the first of which is 'good'",
        ),
        ("short", "returned 1 values for 2 completions"),
    ],
)
def test_a_failing_reward_is_named_with_the_prompt(function: str, reason: str) -> None:
    with pytest.raises(DoRAError, match=reason) as caught:
        score(rewards(function), **FACTS)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [math.nan, math.inf, "1", [1.0]])
def test_anything_but_a_finite_number_is_refused(value: Any) -> None:
    own = Reward(name="own", function=lambda prompts: [0.5, value])
    with pytest.raises(DoRAError, match=r"reward own returned .* for the prompt 'bad'"):
        score([own], **FACTS)


def test_a_long_prompt_of_messages_is_shown_in_one_line() -> None:
    prompt = [{"role": "user", "content": "many\nwords " * 30}]
    own = Reward(name="own", function=lambda prompts: [math.nan])
    with pytest.raises(
        DoRAError, match=r"prompt 'many words .*\.\.\.': return"
    ) as caught:
        score([own], [prompt], ["x"], [[1]], {})
    assert "\n" not in str(caught.value)


def test_a_missing_column_is_named_before_the_run() -> None:
    with pytest.raises(DoRAError, match=r"column needs 'answer': add such"):
        check_columns(rewards("column"), ["level"])
    check_columns(rewards("column", "length"), ["answer"])
    check_columns(rewards("column", column={"answer": [1]}), [])


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("exact", "reward 'exact' is unknown: the shipped ones are exact_match"),
        ("own_rewards.none", "own_rewards has no function none"),
        ("own_rewards.value", "own_rewards has no function value"),
        ("no.such", "importing reward no.such failed: ModuleNotFoundError"),
    ],
)
def test_an_unknown_reward_is_refused(name: str, reason: str) -> None:
    with pytest.raises(DoRAError, match=reason):
        load_rewards(RewardConfig(reward_funcs=(name,)))


def test_a_run_needs_a_reward() -> None:
    with pytest.raises(DoRAError, match="grpo needs a reward: set reward_funcs"):
        load_rewards(RewardConfig())


def test_a_misspelled_argument_is_refused() -> None:
    config = RewardConfig(
        reward_funcs=("regex_match",), reward_arguments={"regex_match": {"patern": "x"}}
    )
    with pytest.raises(DoRAError, match="regex_match has no argument 'patern'"):
        load_rewards(config)
    with pytest.raises(DoRAError, match=r"ids has no argument 'x'"):
        rewards("ids", ids={"x": 1})


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (
            {"reward_weights": (1.0,)},
            "one weight for each of the 2 reward_funcs, got 1",
        ),
        ({"reward_arguments": {"c": {}}}, "names 'c', which is not among"),
        ({"reward_arguments": {"a": 3}}, "reward_arguments 'a' must be a mapping"),
        ({"num_generations": 1}, "num_generations must be at least 2"),
        ({"top_p": 1.5}, "top_p must be above 0 and at most 1"),
        ({"temperature": 0}, "temperature must be above 0"),
        ({"loss_type": "ppo"}, "loss_type must be grpo, bnpo, dr_grpo or dapo"),
        ({"reward_weights": ("a", 1)}, "reward_weights must be a list of numbers"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(DoRAError, match=reason):
        RewardConfig(**{"reward_funcs": ("a", "b"), **settings})
