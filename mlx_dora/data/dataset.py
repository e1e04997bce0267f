"""Rows of text, completions or chats as token sequences, made when first needed."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlx_dora.data.chat import ChatTemplate
from mlx_dora.data.checks import check_row, kind_of
from mlx_dora.data.rows import Rows
from mlx_dora.data.targets import Example, IncompleteSpans, token_row
from mlx_dora.errors import DoRAError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Parts:
    """A conversation cut before its last answer.

    Args:
        prompt: Tokens up to where the answer starts.
        answer: Tokens of the answer, the end of the turn included.
    """

    prompt: list[int]
    answer: list[int]


class TokenDataset:
    """A sequence of ``(tokens, first_target)``, tokenised row by row on first use.

    ``first_target`` is 0, or with ``mask_prompt`` the position where the completion
    starts. All rows are checked when the data set is made: what is wrong with them is
    told before a model trains. A row is what mlx-lm takes, or already a list of tokens,
    or a pair of tokens and first target.

    Args:
        rows: The rows and the names of their features.
        tokenizer: mlx-lm's tokenizer.

    Raises:
        DoRAError: If a row does not have the form of the first one; the message names
            the file, the line, and the keys that were expected and found.
    """

    def __init__(self, rows: Rows, tokenizer: Any) -> None:
        self.rows = rows
        self.kind = kind_of(rows)
        self._tokenizer = tokenizer
        self._cache: list[Example | None] = [None] * len(rows.values)
        self._chat = ChatTemplate(rows, self.kind, tokenizer)
        self._masks = rows.config.mask_prompt or rows.config.all_turns
        if self.kind == "text" and self._masks:
            name = "mask_prompt" if rows.config.mask_prompt else "all_turns"
            raise DoRAError(
                f"{rows.source}: {name} needs completions or chat data; plain text has "
                "no prompt."
            )
        if self.kind == "text" and tokenizer.eos_token_id is None:
            logger.warning(
                "%s: the tokenizer names no end-of-text token; the texts are trained "
                "without one",
                rows.source,
            )
        for index in range(len(rows.values)):
            check_row(rows, index, self.kind)
        if len(self):
            self[0]

    def __len__(self) -> int:
        return len(self.rows.values)

    def __getitem__(self, index: int) -> Example:
        example = self._cache[index]
        if example is None:
            example = self._cache[index] = self._encode(index)
        return example

    def where(self, index: int) -> str:
        """Name a row by file and line, for a message."""
        return self.rows.where(index)

    def answer(self, index: int) -> str | None:
        """The last answer of a row; None for plain text and where no answer ends it."""
        if self.kind in ("text", "tokens"):
            return None
        messages = self._chat.messages(index)
        if messages[-1].get("role") != "assistant":
            return None
        text = messages[-1].get("content")
        return text if isinstance(text, str) else None

    def parts(self, index: int, answer: str) -> Parts:
        """Cut a row that has an `answer` before it, and put this one in its place."""
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
        if self.kind == "tokens":
            return token_row(row)
        if self.kind == "text":
            tokens = list(self._tokenizer.encode(row[config.text_feature]))
            end = self._tokenizer.eos_token_id
            return (tokens if end in (None, *tokens[-1:]) else [*tokens, end]), 0
        messages = self._chat.messages(index)
        tokens = self._chat.tokens(index, messages)
        if not self._masks:
            return tokens, 0
        if self.kind == "chat" and config.all_turns:
            return tokens, self._chat.turns(index, messages, tokens)
        if messages[-1].get("role") != "assistant":
            return tokens, ()
        start = self._chat.start(index, messages, tokens)
        return tokens, IncompleteSpans() if start is None else start


class JoinedDataset:
    """Several data sets one after the other."""

    def __init__(self, parts: Sequence[TokenDataset]) -> None:
        self._places = [(part, i) for part in parts for i in range(len(part))]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Example:
        part, i = self._places[index]
        return part[i]

    def where(self, index: int) -> str:
        """Name a row by its origin."""
        part, i = self._places[index]
        return part.where(i)

    def answer(self, index: int) -> str | None:
        """The last answer of a row, as `TokenDataset.answer`."""
        part, i = self._places[index]
        return part.answer(i)

    def parts(self, index: int, answer: str) -> Parts:
        """A row cut before its last answer, as `TokenDataset.parts`."""
        part, i = self._places[index]
        return part.parts(i, answer)


Dataset = TokenDataset | JoinedDataset
