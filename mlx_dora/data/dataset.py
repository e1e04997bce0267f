"""Rows of text, completions or chats as token sequences, made when first needed."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from mlx_dora.data.checks import check_row, kind_of
from mlx_dora.data.config import DataConfig
from mlx_dora.data.jsonl import SPLITS, Rows, read_splits
from mlx_dora.data.messages import missing_content, parsed_arguments
from mlx_dora.data.turns import TemplateRefusal, answer_span, answer_start
from mlx_dora.errors import DoRAError

logger = logging.getLogger(__name__)

Spans = tuple[tuple[int, int], ...]
Example = tuple[list[int], int | Spans]
"""Tokens, and which of them may be targets: all from a position on, or some spans."""


class IncompleteSpans(Spans):
    """Spans of a row in which the template does not show every answer."""


def target_spans(targets: int | Spans, length: int) -> Spans:
    """The spans ``[start, end)`` of targets among the first `length` tokens.

    A row's very first token is never a target: nothing comes before it.
    """
    spans = ((targets, length),) if isinstance(targets, int) else targets
    cut = ((max(start, 1), min(end, length)) for start, end in spans)
    return tuple((start, end) for start, end in cut if start < end)


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
        self._warned_of_header = False
        self._takes_objects: bool | None = None  # as arguments of tool calls
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
        messages = self._messages(index)
        if not messages or messages[-1].get("role") != "assistant":
            return None
        text = messages[-1].get("content")
        return text if isinstance(text, str) else None

    def parts(self, index: int, answer: str) -> Parts:
        """Cut a row that has an `answer` before it, and put this one in its place."""
        messages = self._messages(index) or []
        messages = [*messages[:-1], {**messages[-1], "content": answer}]
        tokens = self._template(index, messages, False)
        start = self._start(index, messages, tokens)
        if start is None:
            raise DoRAError(
                f"{self.where(index)}: the model's chat template does not show the "
                "answer of this row."
            )
        return Parts(prompt=tokens[:start], answer=tokens[start:])

    def _messages(self, index: int) -> list[Any] | None:
        row, config = self.rows.values[index], self.rows.config
        if self.kind == "completions":
            return [
                {"role": "user", "content": row[config.prompt_feature]},
                {"role": "assistant", "content": row[config.completion_feature]},
            ]
        return self._chat(index) if self.kind == "chat" else None

    def _chat(self, index: int) -> list[Any]:
        """The row's messages, with tool calls in the form that the template takes."""
        written = list(self.rows.values[index][self.rows.config.chat_feature])
        parsed = parsed_arguments(written, self.where(index))
        if parsed == written or self._takes_objects:
            return parsed
        if self._takes_objects is None:
            try:
                self._template(index, parsed, False)
            except TemplateRefusal:  # a few templates join the text to other text
                self._template(index, written, False)
                self._takes_objects = False
                return written
            self._takes_objects = True
            return parsed
        return written

    def _encode(self, index: int) -> Example:
        row, config = self.rows.values[index], self.rows.config
        if self.kind == "tokens":
            return _token_row(row)
        if self.kind == "text":
            tokens = list(self._tokenizer.encode(row[config.text_feature]))
            end = self._tokenizer.eos_token_id
            return (tokens if end in (None, *tokens[-1:]) else [*tokens, end]), 0
        messages = self._messages(index) or []
        tokens = self._template(index, messages, False)
        if not self._masks:
            return tokens, 0
        if self.kind == "chat" and config.all_turns:
            return tokens, self._turns(index, messages, tokens)
        if messages[-1].get("role") != "assistant":
            return tokens, ()
        start = self._start(index, messages, tokens)
        return tokens, IncompleteSpans() if start is None else start

    def _turns(self, index: int, messages: list[Any], tokens: list[int]) -> Spans:
        """Where the assistant's turns stand in a row's tokens."""
        places = [i for i, m in enumerate(messages) if m.get("role") == "assistant"]
        spans = []
        for place in places:
            try:
                span, differs = answer_span(
                    partial(self._template, index), messages, place, tokens
                )
            except TemplateRefusal:  # of a part of the row; it takes the whole
                continue
            if differs and span is not None:
                self._warn_of_header(index, span[0])
            if span is not None:
                spans.append(span)
        is_whole = len(spans) == len(places)
        return tuple(spans) if is_whole else IncompleteSpans(spans)

    def _start(self, index: int, messages: list[Any], tokens: list[int]) -> int | None:
        """Where the last turn's answer starts; None if the template hides it."""
        try:
            start, differs = answer_start(
                partial(self._template, index), messages, len(messages) - 1, tokens
            )
        except TemplateRefusal:
            return None
        if differs and start is not None:
            self._warn_of_header(index, start)
        return start

    def _template(self, index: int, messages: list[Any], generation: bool) -> Any:
        import jinja2

        try:
            return self._tokenizer.apply_chat_template(
                messages,
                tools=self.rows.values[index].get("tools"),
                add_generation_prompt=generation,
                return_dict=False,
            )
        except (ValueError, TypeError, jinja2.TemplateError) as error:
            reason = " ".join(str(error).split())
            raise TemplateRefusal(
                f"{self.where(index)}: the model's chat template does not take this "
                f"row{missing_content(messages)}: {reason}"
            ) from error

    def _warn_of_header(self, index: int, start: int) -> None:
        if not self._warned_of_header:
            self._warned_of_header = True
            logger.warning(
                "%s: the chat template starts this answer differently from a new "
                "answer; targets start after the %d tokens that both share",
                self.where(index),
                start,
            )


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


def load_datasets(
    config: DataConfig, tokenizer: Any, names: Sequence[str] = SPLITS
) -> dict[str, Dataset | None]:
    """Read and check the named splits of a data set; None for one that is not there.

    Raises:
        DoRAError: If the data set does not exist or a row is malformed.
    """
    return make_datasets(read_splits(config, names), tokenizer)


def make_datasets(
    splits: dict[str, list[Rows]], tokenizer: Any
) -> dict[str, Dataset | None]:
    """Check rows that `read_splits` has read, and make data sets of them.

    Raises:
        DoRAError: If a row is malformed.
    """
    loaded: dict[str, Dataset | None] = {}
    for name, parts in splits.items():
        sets = [TokenDataset(rows, tokenizer) for rows in parts]
        loaded[name] = JoinedDataset(sets) if len(sets) > 1 else next(iter(sets), None)
    return loaded


def as_dataset(data: Any, tokenizer: Any, config: DataConfig, name: str) -> Dataset:
    """Take a data set of ours, or any sequence of rows, as a data set.

    Raises:
        DoRAError: If a row is malformed or there is none.
    """
    if isinstance(data, TokenDataset | JoinedDataset):
        return data
    if len(data) == 0:
        raise DoRAError(f"{name} is empty.")
    return TokenDataset(Rows(values=data, source=name, config=config), tokenizer)


def _token_row(row: Any) -> Example:
    if len(row) != 2 or not isinstance(row[0], Sequence):
        return list(row), 0
    tokens, targets = row
    if isinstance(targets, Sequence):
        return list(tokens), tuple((int(a), int(b)) for a, b in targets)
    return list(tokens), int(targets)
