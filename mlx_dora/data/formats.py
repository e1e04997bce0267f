"""The formats of rows: one entry per format, from which help and docs are made."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any

from mlx_dora.data.config import DataConfig
from mlx_dora.errors import DoRAError
from mlx_dora.io.json import parse

Messages = list[dict[str, Any]]
Read = Callable[[Mapping[str, Any], tuple[str, ...], str], Messages]
"""``(row, required_columns, where) -> messages``."""

_DEFAULTS = {field.name: field.default for field in fields(DataConfig)}
_ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
_SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "observation": "tool",
    **{role: role for role in _ROLES},
}


@dataclass(frozen=True, kw_only=True)
class Format:
    """A format of rows: how it is recognized, read and documented.

    Args:
        name: Short name, also `TokenDataset.kind`.
        title: Name in messages and in the documentation.
        columns: Columns that every row has; the name of a field of `DataConfig`, such
            as ``"chat_feature"``, stands for that field's value.
        optional: Further columns that are read.
        doc: What a row becomes, in a few words.
        read: Makes the messages of a row; None if the row is plain text.
        is_dialogue: Whether a row may have several answers.
    """

    name: str
    title: str
    columns: tuple[str, ...]
    optional: tuple[str, ...] = ()
    doc: str
    read: Read | None = None
    is_dialogue: bool = False

    def required(self, config: DataConfig) -> tuple[str, ...]:
        """The columns that every row must have."""
        return tuple(getattr(config, name, name) for name in self.columns)

    def is_named(self, config: DataConfig) -> bool:
        """Whether the user renamed one of the columns."""
        return any(
            getattr(config, name, name) != _DEFAULTS.get(name, name)
            for name in self.columns
        )

    def messages(
        self, row: Mapping[str, Any], config: DataConfig, where: str
    ) -> Messages:
        """The messages of a row.

        Raises:
            DoRAError: If the row does not hold messages.
        """
        assert self.read is not None
        return self.read(row, self.required(config), where)


def _pair(row: Mapping[str, Any], columns: tuple[str, ...], where: str) -> Messages:
    prompt, answer = (text_of(row, column, where) for column in columns)
    return [
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": answer},
    ]


def _alpaca(row: Mapping[str, Any], columns: tuple[str, ...], where: str) -> Messages:
    turns = _pair(row, columns, where)
    if row.get("input"):
        turns[0]["content"] += f"\n\n{text_of(row, 'input', where)}"
    return _system(row, where) + turns


def _sharegpt(row: Mapping[str, Any], columns: tuple[str, ...], where: str) -> Messages:
    return _system(row, where) + _conversation(row, columns, where)


def _conversation(
    row: Mapping[str, Any], columns: tuple[str, ...], where: str
) -> Messages:
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


TOKENS = Format(name="tokens", title="token ids", columns=(), doc="Lists of token ids.")
FORMATS = (
    Format(
        name="completions",
        title="prompt and completion",
        columns=("prompt_feature", "completion_feature"),
        doc="A chat of one user turn and one assistant turn.",
        read=_pair,
    ),
    Format(
        name="chat",
        title="OpenAI messages",
        columns=("chat_feature",),
        optional=("tools",),
        doc="A chat: `role` and `content` per message.",
        read=_conversation,
        is_dialogue=True,
    ),
    Format(
        name="sharegpt",
        title="ShareGPT",
        columns=("conversations",),
        optional=("system", "tools"),
        doc="A chat: `from` and `value` per turn; human is the user, gpt the "
        "assistant, observation a tool.",
        read=_sharegpt,
        is_dialogue=True,
    ),
    Format(
        name="alpaca",
        title="Alpaca",
        columns=("instruction", "output"),
        optional=("input", "system"),
        doc="The user's turn is the instruction, a blank line and the input; the "
        "assistant's turn is the output.",
        read=_alpaca,
    ),
    Format(
        name="text",
        title="plain text",
        columns=("text_feature",),
        doc="The text as it stands, without a chat template.",
    ),
)
"""In order of precedence, after formats whose columns the user named."""

TITLES = ", ".join(
    f"{f.title} ({', '.join(f.required(DataConfig()))})" for f in FORMATS
)


def recognize(row: Mapping[str, Any], config: DataConfig) -> Format | None:
    """The format of a row; None if it has the columns of no format."""
    ordered = sorted(FORMATS, key=lambda format: not format.is_named(config))
    for format in ordered:
        if all(row.get(name) is not None for name in format.required(config)):
            return format
    return None


def docs_table() -> str:
    """The formats as a Markdown table."""
    lines = ["| format | columns | what is trained |", "| --- | --- | --- |"]
    for format in FORMATS:
        columns = ", ".join(f"`{name}`" for name in format.required(DataConfig()))
        if format.optional:
            columns += f"; optional {', '.join(f'`{n}`' for n in format.optional)}"
        lines.append(f"| {format.title} | {columns} | {format.doc} |")
    return "\n".join(lines)
