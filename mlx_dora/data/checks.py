"""What a row must look like; whatever is wrong is said by file, line and key."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from mlx_dora.data.messages import parsed_arguments
from mlx_dora.data.rows import Rows
from mlx_dora.errors import DoRAError

Kind = Literal["completions", "chat", "text", "tokens"]

_HALF = re.compile("[\ud800-\udfff]")


def kind_of(rows: Rows) -> Kind:
    """Tell from the first row what all rows are.

    Raises:
        DoRAError: If there is no row, or the first one has none of the known keys.
    """
    if not len(rows.values):
        raise DoRAError(f"{rows.source} has no rows.")
    first, config = rows.values[0], rows.config
    if not isinstance(first, Mapping):
        return "tokens"
    if config.prompt_feature in first and config.completion_feature in first:
        return "completions"
    if config.chat_feature in first:
        return "chat"
    if config.text_feature in first:
        return "text"
    raise DoRAError(
        f"{rows.where(0)}: expected the keys {config.prompt_feature!r} and "
        f"{config.completion_feature!r}, or {config.chat_feature!r}, or "
        f"{config.text_feature!r}; found {_keys(first)}."
    )


def check_row(rows: Rows, index: int, kind: Kind) -> None:
    """Check one row against the kind of the first.

    Raises:
        DoRAError: Naming the file, the line and what is wrong there.
    """
    row = rows.values[index]
    if kind == "tokens":
        _check_tokens(rows, index)
        return
    if not isinstance(row, Mapping):
        came = type(row).__name__
        raise DoRAError(f"{rows.where(index)}: expected a mapping, got a {came}.")
    expected = _expected_keys(rows, kind)
    missing = [key for key in expected if key not in row]
    if missing:
        wanted = " and ".join(repr(key) for key in expected)
        noun = "key" if len(expected) == 1 else "keys"
        raise DoRAError(
            f"{rows.where(index)}: expected the {noun} {wanted}, as in the first row; "
            f"found {_keys(row)}."
        )
    for key in expected:
        if kind == "chat":
            _check_messages(rows, index, key)
        elif not isinstance(row[key], str):
            raise DoRAError(
                f"{rows.where(index)}: {key!r} must be text, got "
                f"{type(row[key]).__name__}."
            )
        _check_characters(rows, index, key)


def _expected_keys(rows: Rows, kind: Kind) -> tuple[str, ...]:
    config = rows.config
    if kind == "completions":
        return config.prompt_feature, config.completion_feature
    return (config.chat_feature if kind == "chat" else config.text_feature,)


def _check_messages(rows: Rows, index: int, key: str) -> None:
    messages = rows.values[index][key]
    where = f"{rows.where(index)}: {key!r}"
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        came = type(messages).__name__
        raise DoRAError(f"{where} must be a list of messages, got {came}.")
    if not messages:
        raise DoRAError(f"{where} holds no message.")
    for message in messages:
        if not isinstance(message, Mapping) or "role" not in message:
            found = _keys(message) if isinstance(message, Mapping) else repr(message)
            raise DoRAError(
                f"{where}: each message needs the key 'role'; found {found}."
            )
    masks_prompt = rows.config.mask_prompt and not rows.config.all_turns
    if masks_prompt and [m["role"] for m in messages] == ["assistant"]:
        raise DoRAError(
            f"{where} is a single message of the assistant's: there is no prompt "
            "before the answer for mask_prompt to mask. Put the user's turn before "
            "it, remove the row, or use all_turns."
        )
    parsed_arguments(messages, where)


def _check_characters(rows: Rows, index: int, key: str) -> None:
    """Refuse half surrogates, which no tokenizer can encode."""
    for place, text in _texts(rows.values[index][key], key):
        if found := _HALF.search(text):
            raise DoRAError(
                f"{rows.where(index)}: character {found.start() + 1} of {place} is "
                f"\\u{ord(found[0]):04x}, half of a surrogate pair (an emoji or rare "
                "character cut in two): not valid Unicode. Remove or replace it."
            )


def _texts(value: Any, place: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield place, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _texts(inner, f"{place}.{key}")
    elif isinstance(value, Sequence):
        for number, inner in enumerate(value):
            yield from _texts(inner, f"{place}[{number}]")


def _check_tokens(rows: Rows, index: int) -> None:
    row = rows.values[index]
    if isinstance(row, Sequence) and not isinstance(row, str):
        has_targets = len(row) == 2 and isinstance(row[0], Sequence)
        tokens = row[0] if has_targets else row
        if all(isinstance(token, int) for token in tokens):
            return
    raise DoRAError(
        f"{rows.where(index)}: expected a mapping such as {{'text': ...}} or a list of "
        f"token ids, got {type(row).__name__}."
    )


def _keys(row: Mapping[str, Any]) -> str:
    return ", ".join(repr(key) for key in row) or "none"
