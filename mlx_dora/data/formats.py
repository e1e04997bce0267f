"""The formats of rows: one entry per format, from which help and docs are made."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from mlx_dora.data.config import DataConfig
from mlx_dora.data.conversations import (
    Messages,
    Read,
    read_alpaca,
    read_conversation,
    read_pair,
    read_sharegpt,
)

_DEFAULTS = {field.name: field.default for field in fields(DataConfig)}


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


TOKENS = Format(name="tokens", title="token ids", columns=(), doc="Lists of token ids.")
FORMATS = (
    Format(
        name="completions",
        title="prompt and completion",
        columns=("prompt_feature", "completion_feature"),
        doc="A chat of one user turn and one assistant turn.",
        read=read_pair,
    ),
    Format(
        name="chat",
        title="OpenAI messages",
        columns=("chat_feature",),
        optional=("tools",),
        doc="A chat: `role` and `content` per message.",
        read=read_conversation,
        is_dialogue=True,
    ),
    Format(
        name="sharegpt",
        title="ShareGPT",
        columns=("conversations",),
        optional=("system", "tools"),
        doc="A chat: `from` and `value` per turn; human is the user, gpt the "
        "assistant, observation a tool.",
        read=read_sharegpt,
        is_dialogue=True,
    ),
    Format(
        name="alpaca",
        title="Alpaca",
        columns=("instruction", "output"),
        optional=("input", "system"),
        doc="The user's turn is the instruction, a blank line and the input; the "
        "assistant's turn is the output.",
        read=read_alpaca,
    ),
    Format(
        name="text",
        title="plain text",
        columns=("text_feature",),
        doc="The text as it stands, without a chat template.",
    ),
)
"""In order of precedence, after formats whose columns the user named."""


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
