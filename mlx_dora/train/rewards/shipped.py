"""Rewards that need no code of the user: 1 for a good completion, else 0.

Each has TRL's signature: lists of equal length, completions as text or, after a prompt
of messages, as a list of one message. The expected answers come from a column of the
data, the pattern and the schema from a column or an argument.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mlx_dora.errors import DoRAError
from mlx_dora.io.json import parse
from mlx_dora.train.rewards.schema import check_schema, schema_problem

Completion = str | Sequence[Mapping[str, Any]]

_NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|-?\.\d+")


def exact_match(
    completions: Sequence[Completion],
    answer: Sequence[Any],
    *,
    ignore_case: bool = False,
    **columns: Any,
) -> list[float]:
    """Whether each completion is the answer, apart from white space around it.

    Args:
        completions: The completions.
        answer: Column of the expected texts.
        ignore_case: Whether to ignore upper and lower case.
        **columns: Ignored.
    """
    fold = str.casefold if ignore_case else str
    return [
        float(fold(text_of(text).strip()) == fold(str(wanted).strip()))
        for text, wanted in zip(completions, answer, strict=True)
    ]


def number_match(
    completions: Sequence[Completion],
    answer: Sequence[Any],
    *,
    tolerance: float = 0.0,
    **columns: Any,
) -> list[float]:
    """Whether the last number in each completion equals the answer's.

    Args:
        completions: The completions; commas may group digits by three.
        answer: Column of the expected numbers, or of texts whose last number counts (as
            in GSM8K's ``#### 42``).
        tolerance: Largest difference that counts as equal.
        **columns: Ignored.

    Raises:
        DoRAError: If an answer holds no number.
    """
    rewards = []
    for text, wanted in zip(completions, answer, strict=True):
        target = _last_number(str(wanted))
        if target is None:
            raise DoRAError(f"the answer {wanted!r:.60} holds no number")
        given = _last_number(text_of(text))
        rewards.append(float(given is not None and abs(given - target) <= tolerance))
    return rewards


def regex_match(
    completions: Sequence[Completion],
    pattern: str | Sequence[str],
    *,
    search: bool = False,
    **columns: Any,
) -> list[float]:
    """Whether a regular expression matches each completion as a whole.

    Args:
        completions: The completions, without white space around them.
        pattern: The expression (``.`` also matches line breaks), or a column of
            expressions.
        search: Whether a match anywhere in the completion is enough.
        **columns: Ignored.

    Raises:
        DoRAError: If a pattern is not a regular expression.
    """
    rewards = []
    patterns = [pattern] * len(completions) if isinstance(pattern, str) else pattern
    for text, wanted in zip(completions, patterns, strict=True):
        try:
            expression = re.compile(wanted, re.DOTALL)
        except (re.error, TypeError) as error:
            raise DoRAError(
                f"{wanted!r:.60} is not a regular expression ({error})"
            ) from None
        match = expression.search if search else expression.fullmatch
        rewards.append(float(match(text_of(text).strip()) is not None))
    return rewards


def valid_json(
    completions: Sequence[Completion],
    schema: Mapping[str, Any] | str | Sequence[Any] | None = None,
    **columns: Any,
) -> list[float]:
    """Whether each completion is JSON and nothing else, and satisfies a schema.

    Args:
        completions: The completions.
        schema: The schema (see `mlx_dora.train.rewards.schema`), as a mapping or JSON
            text, or a column of such; None if any JSON is good.
        **columns: Ignored.

    Raises:
        DoRAError: If the schema is not valid.
    """
    if schema is None or isinstance(schema, Mapping | str):
        schema = [schema] * len(completions)
    rewards = []
    for text, wanted in zip(completions, schema, strict=True):
        rules = parse(wanted, "the schema") if isinstance(wanted, str) else wanted
        rules = {} if rules is None else rules
        check_schema(rules)
        try:
            value = json.loads(text_of(text), parse_constant=_refuse)
            rewards.append(float(not schema_problem(value, rules)))
        except (ValueError, RecursionError):
            rewards.append(0.0)
    return rewards


def _refuse(constant: str) -> None:
    """NaN and Infinity, which Python reads, are not JSON."""
    raise ValueError(constant)


SHIPPED: dict[str, Callable[..., list[float]]] = {
    function.__name__: function
    for function in (exact_match, number_match, regex_match, valid_json)
}
"""The shipped rewards by name."""


def text_of(completion: Completion) -> str:
    """The text of a completion in either form."""
    if isinstance(completion, str):
        return completion
    return str(completion[-1].get("content") or "")


def _last_number(text: str) -> float | None:
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None
