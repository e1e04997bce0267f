"""Reads a row of preferences: its prompt and its answers, as chat or as text.

The formats are TRL's: ``chosen`` and ``rejected`` with a ``prompt`` or with the prompt
in both, and ``prompt``, ``completion`` and ``label``; each as lists of messages or as
text. Transcripts of Anthropic's HH-RLHF are text with the prompt in both.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mlx_dora.data.config import DataConfig
from mlx_dora.data.conversations import key_names, read_conversation
from mlx_dora.data.rows import Rows
from mlx_dora.errors import DoRAError

PAIR = ("chosen", "rejected")
LABEL = "label"
_HH_PROMPT, _HH_ANSWER = "\n\nHuman:", "\n\nAssistant:"
_LABELS = {"true": True, "false": False, "1": True, "0": False}


@dataclass(frozen=True, kw_only=True)
class Answers:
    """The prompt and the answers of a row.

    Args:
        prompt: Messages, or text.
        answers: The answers by column, in the form of the prompt.
        is_chat: Whether they are messages.
        is_implicit: Whether the prompt was found in the answers.
    """

    prompt: Any
    answers: dict[str, Any]
    is_chat: bool
    is_implicit: bool = False

    def conversations(self) -> Iterator[list[Any]]:
        """The messages up to the end of each answer."""
        return ([*self.prompt, *answer] for answer in self.answers.values())


def is_paired(rows: Rows) -> bool:
    """Whether the first row holds two answers."""
    first = rows.values[0]
    return isinstance(first, Mapping) and all(first.get(name) for name in PAIR)


def required_columns(rows: Rows, pairs: bool) -> tuple[str, ...]:
    """The columns that every row must have, from the first row.

    Raises:
        DoRAError: If the first row lacks them.
    """
    config, first = rows.config, rows.values[0]
    wanted = (config.prompt_feature, config.completion_feature, LABEL)
    if not isinstance(first, Mapping):
        came = type(first).__name__
        raise DoRAError(f"{rows.where(0)}: expected a mapping, got a {came}.")
    if pairs:
        has_prompt = first.get(config.prompt_feature) is not None
        wanted = (*(config.prompt_feature,) * has_prompt, *PAIR)
    if any(first.get(name) is None for name in wanted):
        forms = (
            f"{PAIR[0]!r} and {PAIR[1]!r}, optionally with {config.prompt_feature!r}"
        )
        if not pairs:
            forms = f"{', '.join(map(repr, wanted))}, or {forms}"
        raise DoRAError(
            f"{rows.where(0)}: expected the columns {forms}; found {key_names(first)}. "
            "Rename yours, or name the prompt's with --prompt-feature and the "
            "completion's with --completion-feature."
        )
    return wanted


def read_answers(
    row: Mapping[str, Any], columns: tuple[str, ...], config: DataConfig, where: str
) -> Answers:
    """Read a row.

    Args:
        row: The row.
        columns: The columns that it must have, from `required_columns`.
        config: Names of the columns.
        where: Name of the row, for messages.

    Raises:
        DoRAError: If a column is missing or holds neither text nor messages, or the
            answers share no prompt.
    """
    missing = [name for name in columns if row.get(name) is None]
    if missing:
        raise DoRAError(
            f"{where}: expected the keys {', '.join(map(repr, columns))}, as in the "
            f"first row; found {key_names(row)} without {', '.join(missing)}."
        )
    names = [n for n in columns if n in (*PAIR, config.completion_feature)]
    answers = {name: _value(row, name, where) for name in names}
    prompt = None
    if row.get(config.prompt_feature) is not None:
        prompt = _value(row, config.prompt_feature, where)
    kinds = {isinstance(value, list) for value in answers.values()}
    if len(kinds) > 1:
        raise DoRAError(
            f"{where}: one of 'chosen' and 'rejected' is text and the other is a list "
            "of messages: write both in one form."
        )
    is_chat = isinstance(prompt, list) or kinds == {True}
    if is_chat:
        return _chat(prompt, answers, where)
    if prompt is not None:
        return Answers(prompt=prompt, answers=answers, is_chat=False)
    return _shared_text(answers, where)


def _value(row: Mapping[str, Any], name: str, where: str) -> Any:
    """Text, or messages in OpenAI's form."""
    value = row[name]
    is_cell = isinstance(value, str) and value.lstrip().startswith("[{")
    if isinstance(value, str) and not is_cell:
        return value
    if isinstance(value, Mapping) or not (is_cell or hasattr(value, "__iter__")):
        came = type(value).__name__
        raise DoRAError(
            f"{where}: {name!r} must be text or a list of messages, got {came}."
        )
    return read_conversation(row, (name,), where)


def _chat(prompt: Any, answers: dict[str, Any], where: str) -> Answers:
    answers = {
        name: [{"role": "assistant", "content": value}]
        if isinstance(value, str)
        else value
        for name, value in answers.items()
    }
    first = next(iter(answers.values()))[0]["role"]
    if isinstance(prompt, list):
        return Answers(prompt=prompt, answers=answers, is_chat=True)
    if prompt is not None and first == "assistant":
        prompt = [{"role": "user", "content": prompt}]
        return Answers(prompt=prompt, answers=answers, is_chat=True)
    if len(answers) == 1:
        raise DoRAError(
            f"{where}: the completion starts with a turn of role {first!r}: give the "
            "prompt as a list of messages, and only the answer as the completion."
        )
    chosen, rejected = answers.values()
    count = _common(chosen, rejected)
    if count == 0 or count == min(len(chosen), len(rejected)):
        what = "share no first turn" if count == 0 else "do not end in different turns"
        raise DoRAError(
            f"{where}: 'chosen' and 'rejected' {what}: expected conversations that are "
            "equal up to the answer, or a column with the prompt."
        )
    rest = {name: value[count:] for name, value in answers.items()}
    return Answers(prompt=chosen[:count], answers=rest, is_chat=True, is_implicit=True)


def _shared_text(answers: dict[str, str], where: str) -> Answers:
    """Divide texts after their common start; transcripts before the last answer."""
    chosen, rejected = answers.values()
    count = min(_common(chosen, rejected), len(chosen) - 1, len(rejected) - 1)
    if chosen.startswith(_HH_PROMPT):
        end = chosen.rfind(_HH_ANSWER) + len(_HH_ANSWER)
        if end >= len(_HH_ANSWER) and chosen[:end] == rejected[:end]:
            count = end
    elif count > 0 and chosen[count - 1] == " ":
        count -= 1  # the space belongs to the answer's first token
    if count < 1:
        raise DoRAError(
            f"{where}: 'chosen' and 'rejected' have no common start: give the prompt "
            "in a column of its own."
        )
    return Answers(
        prompt=chosen[:count],
        answers={name: text[count:] for name, text in answers.items()},
        is_chat=False,
        is_implicit=True,
    )


def _common(first: Any, second: Any) -> int:
    """Number of equal items at the start of two sequences."""
    pairs = enumerate(zip(first, second, strict=False))
    return next(
        (place for place, (a, b) in pairs if a != b), min(len(first), len(second))
    )


def label_of(row: Mapping[str, Any], where: str) -> bool:
    """The label of a row.

    Raises:
        DoRAError: If it is not true or false.
    """
    value = row[LABEL]
    if isinstance(value, bool):
        return value
    label = _LABELS.get(str(value).strip().lower())
    if label is None:
        raise DoRAError(
            f"{where}: {LABEL!r} must be true (desirable) or false, got {value!r:.40}."
        )
    return label


def title_of(answers: Answers, noun: str) -> str:
    """Name a format for messages."""
    form = "chat" if answers.is_chat else "plain text, without the chat template"
    implicit = ", prompt in both" if answers.is_implicit else ""
    return f"{noun} as {form}{implicit}"
