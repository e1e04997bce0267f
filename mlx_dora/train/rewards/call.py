"""Loads rewards by name and calls them, and checks what they return."""

import importlib
import inspect
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mlx_dora.errors import DoRAError
from mlx_dora.io.foreign import user_code
from mlx_dora.train.grpo.config import RewardConfig
from mlx_dora.train.rewards.shipped import SHIPPED

_FACTS = ("prompts", "completions", "completion_ids")
_SHOWN = 80
"""Number of characters of a prompt in an error."""


@dataclass(frozen=True, kw_only=True)
class Reward:
    """A reward function under the name that the user gave.

    Args:
        name: Name of a shipped reward, or dotted name of a function.
        function: Takes lists ``prompts``, ``completions``, ``completion_ids`` and the
            data's columns by name, as many of these as it has parameters for; returns a
            number for each completion, or None for a completion that it does not judge.
        arguments: Further keyword arguments.
    """

    name: str
    function: Callable[..., Sequence[float | None]]
    arguments: Mapping[str, Any] = field(default_factory=dict)


def load_rewards(config: RewardConfig) -> list[Reward]:
    """Find the functions that ``reward_funcs`` names.

    Modules are looked for where Python looks, and in the current folder.

    Raises:
        DoRAError: If none is named, or a function does not exist or does not take its
            arguments.
    """
    if not config.reward_funcs:
        raise DoRAError(
            "grpo needs a reward: set reward_funcs (--reward-funcs) to any of "
            f"{', '.join(SHIPPED)}, or to the dotted name of a Python function."
        )
    given = config.reward_arguments or {}
    return [_load(name, given.get(name, {})) for name in config.reward_funcs]


def check_columns(rewards: Sequence[Reward], columns: Iterable[str]) -> None:
    """Check that every reward gets the arguments it needs.

    Args:
        rewards: The rewards.
        columns: Names of the data's columns besides the prompt.

    Raises:
        DoRAError: Names the reward and the arguments that it lacks.
    """
    columns = [*columns]
    for reward in rewards:
        given = {*_FACTS, *columns, *reward.arguments}
        needed = [
            name
            for name, parameter in inspect.signature(reward.function).parameters.items()
            if parameter.default is parameter.empty
            and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
            and name not in given
        ]
        if needed:
            raise DoRAError(
                f"reward {reward.name} needs {', '.join(map(repr, needed))}: add such "
                "a column to the data or set it in reward_arguments; the data has "
                f"{', '.join(columns) or 'no column'} besides the prompt."
            )


def score(
    rewards: Sequence[Reward],
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Sequence[Sequence[int]],
    columns: Mapping[str, Sequence[Any]],
) -> np.ndarray:
    """Call every reward on a batch of completions.

    Args:
        rewards: The rewards.
        prompts: The prompt of each completion, as text or messages.
        completions: The completions, as text, or as a list of one message if the
            prompts are messages.
        completion_ids: Tokens of each completion.
        columns: The data's other columns, repeated for each completion.

    Returns:
        Float64 of shape ``(completions, rewards)``; NaN where a function returned None.

    Raises:
        DoRAError: If a function fails, or returns anything but a finite number or None
            for each completion; names the function and the prompt.
    """
    given = (prompts, completions, completion_ids)
    facts = {**columns, **dict(zip(_FACTS, given, strict=True))}
    table = np.full((len(completions), len(rewards)), np.nan)
    for number, reward in enumerate(rewards):
        for row, value in enumerate(_values(reward, facts)):
            if value is not None:
                table[row, number] = value
    return table


def _load(name: str, arguments: Mapping[str, Any]) -> Reward:
    function = SHIPPED.get(name) or _imported(name)
    reward = Reward(name=name, function=function, arguments=arguments)
    parameters = inspect.signature(function).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    # The shipped ones ignore unknown columns, but not a misspelled argument.
    known = None if takes_all and name not in SHIPPED else parameters
    unknown = [key for key in arguments if known is not None and key not in known]
    if unknown:
        raise DoRAError(
            f"reward {name} has no argument {', '.join(map(repr, unknown))}; it takes "
            f"{', '.join(parameters)}."
        )
    return reward


def _imported(name: str) -> Callable[..., Any]:
    module_name, _, attribute = name.rpartition(".")
    if not module_name:
        raise DoRAError(
            f"reward {name!r} is unknown: the shipped ones are {', '.join(SHIPPED)}; "
            "name others with their module, as in my_module.my_reward."
        )
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    with user_code(f"importing reward {name}"):
        module = importlib.import_module(module_name)
    function = getattr(module, attribute, None)
    if not callable(function):
        raise DoRAError(f"reward {name}: {module_name} has no function {attribute}.")
    return function


def _values(reward: Reward, facts: Mapping[str, Any]) -> list[float | None]:
    """The values of one reward for each completion."""
    try:
        found = _call(reward, facts)
    except DoRAError as error:
        _name_prompt(reward, facts)
        prompt = _shown(facts["prompts"][0])
        raise DoRAError(
            f"{error} (only when called with all prompts of a batch, the first of "
            f"which is {prompt})."
        ) from error
    for row, value in enumerate(found):
        if value is None:
            continue
        is_number = isinstance(value, int | float | np.integer | np.floating)
        if not is_number or not math.isfinite(value):
            raise DoRAError(
                f"reward {reward.name} returned {value!r:.40} for the prompt "
                f"{_shown(facts['prompts'][row])}: return a finite number, or None for "
                "a completion that it does not judge."
            )
    return found


def _call(reward: Reward, facts: Mapping[str, Any]) -> list[float | None]:
    parameters = inspect.signature(reward.function).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    passed = {k: v for k, v in facts.items() if takes_all or k in parameters}
    passed |= reward.arguments
    with user_code(f"reward {reward.name}"):
        found = list(reward.function(**passed))
    count = len(facts["completions"])
    if len(found) != count:
        raise DoRAError(
            f"reward {reward.name} returned {len(found)} values for {count} completions"
        )
    return found


def _name_prompt(reward: Reward, facts: Mapping[str, Any]) -> None:
    """Raise the error of the first prompt that a reward fails for by itself."""
    for row, prompt in enumerate(facts["prompts"]):
        alone = {name: values[row : row + 1] for name, values in facts.items()}
        try:
            _call(reward, alone)
        except DoRAError as error:
            raise DoRAError(f"{error}, for the prompt {_shown(prompt)}.") from error


def _shown(prompt: Any) -> str:
    """A prompt in one line, cut if long."""
    text = prompt if isinstance(prompt, str) else str(prompt[-1].get("content"))
    text = " ".join(text.split())
    return repr(text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}...")
