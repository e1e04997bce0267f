"""Rows of text, completions or chats as token sequences, tokenized on first use."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_dora.data.chat import ChatTemplate
from mlx_dora.data.checks import check_row, format_of
from mlx_dora.data.formats import TOKENS
from mlx_dora.data.rows import Rows
from mlx_dora.data.targets import Example, IncompleteSpans, token_row
from mlx_dora.errors import DoRAError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Parts:
    """A conversation split before its last answer.

    Args:
        prompt: Tokens before the answer.
        answer: Tokens of the answer, including the end of the turn.
    """

    prompt: list[int]
    answer: list[int]


class RowDataset:
    """A data set made from rows, whose examples can be named in messages.

    Attributes:
        serves: Names of the objectives that it is made for; empty for any.
    """

    serves: tuple[str, ...] = ()

    @property
    def reading(self) -> str:
        """How rows are read: their format, and the columns used and not used."""
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int, /) -> Example:
        raise NotImplementedError

    def where(self, index: int, /) -> str:
        """Name an example by file and line, for use in messages."""
        raise NotImplementedError


class TokenDataset(RowDataset):
    """A sequence of ``(tokens, first_target)``, tokenized row by row on first use.

    ``first_target`` is 0, or with ``mask_prompt`` the position where the completion
    starts. All rows are checked when the data set is made, so that errors appear before
    training starts. A row has one of the formats of `mlx_dora.data.formats`, or is a
    list of tokens, or a pair of tokens and first target.

    Args:
        rows: The rows and the names of their features.
        tokenizer: mlx-lm's tokenizer.

    Raises:
        DoRAError: If a row does not have the form of the first row; the message names
            the file, the line, the expected keys and the actual keys.
    """

    serves = ("sft",)

    def __init__(self, rows: Rows, tokenizer: Any) -> None:
        self.rows = rows
        self.format = format_of(rows)
        self.kind = self.format.name
        self._tokenizer = tokenizer
        self._cache: list[Example | None] = [None] * len(rows.values)
        self._chat = ChatTemplate(rows, self.format, tokenizer)
        self._masks = rows.config.mask_prompt or rows.config.all_turns
        if self.kind == "text" and self._masks:
            name = "mask_prompt" if rows.config.mask_prompt else "all_turns"
            raise DoRAError(
                f"{rows.source}: {name} needs completions or chat data; plain text has "
                "no prompt."
            )
        if self.kind == "text" and tokenizer.eos_token_id is None:
            logger.warning(
                "%s: the tokenizer has no end-of-text token; the texts are trained "
                "without it",
                rows.source,
            )
        for index in range(len(rows.values)):
            check_row(rows, index, self.format)
        if len(self):
            self[0]

    def __len__(self) -> int:
        return len(self.rows.values)

    def __getitem__(self, index: int) -> Example:
        example = self._cache[index]
        if example is None:
            example = self._cache[index] = self._encode(index)
        return example

    @property
    def reading(self) -> str:
        """How rows are read: their format, and the columns used and not used."""
        if self.format is TOKENS:
            return self.format.title
        used = self.format.required(self.rows.config)
        columns = describe_columns(
            self.format.title, self.rows.values[0], used, self.format.optional
        )
        if self._masks or not self.has_answers:
            return columns
        return f"{columns}; the loss counts prompts, too (mask_prompt: answers only)"

    @property
    def has_answers(self) -> bool:
        """Whether the rows are conversations, so that prompts can be masked."""
        return self.format.read is not None

    def where(self, index: int) -> str:
        """Name a row by file and line, for use in messages."""
        return self.rows.where(index)

    def answer(self, index: int) -> str | None:
        """The answer that ends a row; None for plain text or if no answer ends it."""
        if not self.has_answers:
            return None
        messages = self._chat.messages(index)
        if messages[-1].get("role") != "assistant":
            return None
        text = messages[-1].get("content")
        return text if isinstance(text, str) else None

    def parts(self, index: int, answer: str) -> Parts:
        """Split a row before its last answer, replaced by `answer`."""
        messages = self._chat.messages(index)
        messages = [*messages[:-1], {**messages[-1], "content": answer}]
        tokens = self._chat.tokens(index, messages)
        start = self._chat.start(index, messages, tokens)
        if start is None:
            raise DoRAError(
                f"{self.where(index)}: the model's chat template does not show the "
                "answer of this row."
            )
        return Parts(prompt=tokens[:start], answer=tokens[start:])

    def _encode(self, index: int) -> Example:
        row, config = self.rows.values[index], self.rows.config
        if self.format is TOKENS:
            return token_row(row)
        if self.kind == "text":
            tokens = list(self._tokenizer.encode(row[config.text_feature]))
            end = self._tokenizer.eos_token_id
            return (tokens if end in (None, *tokens[-1:]) else [*tokens, end]), 0
        messages = self._chat.messages(index)
        tokens = self._chat.tokens(index, messages)
        if not self._masks:
            return tokens, 0
        if self.format.is_dialogue and config.all_turns:
            return tokens, self._chat.turns(index, messages, tokens)
        if messages[-1].get("role") != "assistant":
            return tokens, ()
        start = self._chat.start(index, messages, tokens)
        return tokens, IncompleteSpans() if start is None else start


def describe_columns(
    title: str,
    first: Mapping[str, Any],
    required: Sequence[str],
    optional: Sequence[str] = (),
) -> str:
    """Describe a format and the columns of the first row that it uses or does not."""
    used = (*required, *(name for name in optional if name in first))
    rest = [name for name in first if name not in used]
    unused = f", without {', '.join(rest)}" if rest else ""
    return f"{title} ({', '.join(used)}{unused})"


class JoinedDataset(RowDataset):
    """Several data sets, concatenated."""

    def __init__(self, parts: Sequence[Any]) -> None:
        self._parts = parts
        self.serves = parts[0].serves
        self._places = [(part, i) for part in parts for i in range(len(part))]

    @property
    def reading(self) -> str:
        """How the rows of the first part are read."""
        return self._parts[0].reading

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Example:
        part, i = self._places[index]
        return part[i]

    def where(self, index: int) -> str:
        """Name a row by its origin, as `TokenDataset.where`."""
        part, i = self._places[index]
        return part.where(i)

    def prompt(self, index: int) -> Any:
        """The prompt of a row, as `PromptDataset.prompt`."""
        part, i = self._places[index]
        return part.prompt(i)

    def label(self, index: int) -> bool:
        """Whether an answer is desirable, as `LabeledDataset.label`."""
        part, i = self._places[index]
        return part.label(i)

    def answer(self, index: int) -> str | None:
        """The last answer of a row, as `TokenDataset.answer`."""
        part, i = self._places[index]
        return part.answer(i)

    def parts(self, index: int, answer: str) -> Parts:
        """A row split before its last answer, as `TokenDataset.parts`."""
        part, i = self._places[index]
        return part.parts(i, answer)


Dataset = TokenDataset | JoinedDataset
