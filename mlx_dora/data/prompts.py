"""Rows with a prompt and columns for rewards, whose completions are sampled."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlx_dora.data.chat import ChatTemplate
from mlx_dora.data.checks import check_characters
from mlx_dora.data.conversations import key_names, read_conversation
from mlx_dora.data.dataset import RowDataset, describe_columns
from mlx_dora.data.formats import TOKENS
from mlx_dora.data.messages import parsed_arguments
from mlx_dora.data.rows import Rows
from mlx_dora.data.targets import Example
from mlx_dora.errors import DoRAError

RESERVED = ("prompts", "completions", "completion_ids")
"""Names under which rewards get what does not come from the data."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt and what the data says about it.

    Args:
        value: Text, or a list of messages.
        columns: The row's other columns.
    """

    value: Any
    columns: Mapping[str, Any]

    @property
    def is_chat(self) -> bool:
        """Whether the prompt is a list of messages."""
        return not isinstance(self.value, str)


class PromptDataset(RowDataset):
    """Prompts, tokenized on first use; the other columns are for rewards.

    Rows are read as TRL reads them: messages through the chat template, followed by the
    header of an answer, and text as it stands. An example is a prompt and, as its only
    target, an end token in the place of the completion. All rows are checked when the
    data set is made.

    Args:
        rows: The rows.
        tokenizer: mlx-lm's tokenizer.

    Raises:
        DoRAError: If a row is malformed; names the file, line and problem.
    """

    def __init__(self, rows: Rows, tokenizer: Any) -> None:
        if not len(rows.values):
            raise DoRAError(f"{rows.source} has no rows.")
        self.rows = rows
        self._tokenizer = tokenizer
        self._chat = ChatTemplate(rows, TOKENS, tokenizer)
        self._prompts = [self._read(index) for index in range(len(rows.values))]
        self._cache: list[Example | None] = [None] * len(self._prompts)
        self[0]

    def __len__(self) -> int:
        return len(self._prompts)

    def __getitem__(self, index: int) -> Example:
        example = self._cache[index]
        if example is None:
            example = self._cache[index] = self._encode(index)
        return example

    @property
    def reading(self) -> str:
        """How rows are read: their format, and the columns used and not used."""
        first = self._prompts[0]
        title = "prompts of messages" if first.is_chat else "prompts of text"
        return describe_columns(title, self.rows.values[0], (*self.rows.values[0],))

    def where(self, index: int) -> str:
        """Name a row by file and line, for use in messages."""
        return self.rows.where(index)

    def prompt(self, index: int) -> Prompt:
        """The prompt of a row."""
        return self._prompts[index]

    def _read(self, index: int) -> Prompt:
        row, where = self.rows.values[index], self.rows.where(index)
        name = self.rows.config.prompt_feature
        if not isinstance(row, Mapping):
            came = type(row).__name__
            raise DoRAError(f"{where}: expected a mapping with the key {name!r}, got a "
                            f"{came}.")  # fmt: skip
        if row.get(name) is None:
            raise DoRAError(
                f"{where}: expected the key {name!r}; found {key_names(row)}. Name "
                "yours with --prompt-feature."
            )
        first = self.rows.values[0]
        if {*row} != {*first}:
            raise DoRAError(
                f"{where}: expected the keys {key_names(first)}, as in the first row; "
                f"found {key_names(row)}."
            )
        if taken := [key for key in row if key in RESERVED]:
            raise DoRAError(
                f"{where}: the column {taken[0]!r} would hide what rewards get under "
                "this name: rename it."
            )
        check_characters(self.rows, index, name)
        value, columns = row[name], {k: v for k, v in row.items() if k != name}
        is_cell = isinstance(value, str) and value.lstrip().startswith("[{")
        if isinstance(value, str) and not is_cell:
            if not value:
                raise DoRAError(f"{where}: {name!r} is empty.")
            return Prompt(value=value, columns=columns)
        messages = read_conversation(row, (name,), where)
        if messages[-1]["role"] == "assistant":
            raise DoRAError(
                f"{where}: {name!r} ends with an assistant's message; the prompt must "
                "end before the answer that is sampled."
            )
        return Prompt(value=parsed_arguments(messages, where), columns=columns)

    def _encode(self, index: int) -> Example:
        prompt = self._prompts[index]
        if prompt.is_chat:
            tokens = self._chat.tokens(index, prompt.value, True)
        else:
            tokens = list(self._tokenizer.encode(prompt.value))
        end = self._tokenizer.eos_token_id
        return [*tokens, 0 if end is None else end], len(tokens)


def digest_columns(data: Any) -> str:
    """Hash the columns of all prompts of a data set, in order."""
    total = hashlib.sha256()
    for index in range(len(data)):
        columns = data.prompt(index).columns
        text = json.dumps(columns, sort_keys=True, default=repr)
        total.update(text.encode() + b"\n")
    return f"sha256:{total.hexdigest()}"
