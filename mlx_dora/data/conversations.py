"""Makes the messages of a chat from a row of any format."""

from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from mlx_dora.errors import DoRAError
from mlx_dora.io.json import parse

Messages = list[dict[str, Any]]
Read = Callable[[Mapping[str, Any], tuple[str, ...], str], Messages]
"""``(row, required_columns, where) -> messages``."""


_ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
_SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "observation": "tool",
    **{role: role for role in _ROLES},
}


def read_pair(row: Mapping[str, Any], columns: tuple[str, ...], where: str) -> Messages:
    """A prompt and its completion."""
    prompt, answer = (text_of(row, column, where) for column in columns)
    return [
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": answer},
    ]


def read_alpaca(
    row: Mapping[str, Any], columns: tuple[str, ...], where: str
) -> Messages:
    """An instruction with optional input and system prompt, and the output."""
    turns = read_pair(row, columns, where)
    if row.get("input"):
        turns[0]["content"] += f"\n\n{text_of(row, 'input', where)}"
    return _system(row, where) + turns


def read_sharegpt(
    row: Mapping[str, Any], columns: tuple[str, ...], where: str
) -> Messages:
    """A list of messages beside an optional system prompt."""
    return _system(row, where) + read_conversation(row, columns, where)


def read_conversation(
    row: Mapping[str, Any], columns: tuple[str, ...], where: str
) -> Messages:
    """A list of messages, in OpenAI's form or ShareGPT's."""
    place = f"{where}: {columns[0]!r}"
    value = row[columns[0]]
    if isinstance(value, str) and value.lstrip().startswith("["):  # a cell of a CSV
        value = parse(value, place)
    if not isinstance(value, Sequence) or isinstance(value, str):
        came = type(value).__name__
        raise DoRAError(f"{place} must be a list of messages, got {came}.")
    if not value:
        raise DoRAError(f"{place} holds no message.")
    return [_turn(turn, f"{place}[{number}]") for number, turn in enumerate(value)]


def _turn(turn: Any, where: str) -> dict[str, Any]:
    """A message in OpenAI's form, from that form or ShareGPT's."""
    if not isinstance(turn, Mapping) or not ("role" in turn or "from" in turn):
        got = key_names(turn) if isinstance(turn, Mapping) else repr(turn)
        raise DoRAError(
            f"{where}: a message needs the keys 'role' and 'content', or 'from' and "
            f"'value' (ShareGPT); found {got}."
        )
    # Tables write null where a message lacks a key that another message has.
    turn = {k: v for k, v in turn.items() if v is not None or k == "content"}
    roles = {role: role for role in _ROLES}
    key = "role"
    if "role" not in turn:
        key, roles = "from", _SHAREGPT_ROLES
        turn["content"] = text_of(turn, "value", where)
        del turn["value"]
    role = turn.pop(key, None)
    if role not in roles:
        near = get_close_matches(str(role), roles, n=1)
        raise DoRAError(
            f"{where}: unknown role {role!r}; expected one of {', '.join(roles)}"
            f"{f' (did you mean {near[0]!r}?)' if near else ''}."
        )
    return {"role": roles[role], **turn}


def _system(row: Mapping[str, Any], where: str) -> Messages:
    if not row.get("system"):
        return []
    return [{"role": "system", "content": text_of(row, "system", where)}]


def text_of(row: Mapping[str, Any], column: str, where: str) -> str:
    """The text in a column.

    Raises:
        DoRAError: If the column is missing or holds something other than text.
    """
    if column not in row:
        raise DoRAError(
            f"{where}: expected the key {column!r}; found {key_names(row)}."
        )
    if not isinstance(row[column], str):
        came = type(row[column]).__name__
        raise DoRAError(f"{where}: {column!r} must be text, got {came}.")
    return row[column]


def key_names(row: Mapping[str, Any]) -> str:
    """The keys of a row, for messages."""
    return ", ".join(repr(key) for key in row) or "none"
