"""Rows of preferences as examples: pairs of answers, or answers with a label."""

import logging
from collections.abc import Mapping
from functools import partial
from typing import Any

from mlx_dora.data.chat import ChatTemplate
from mlx_dora.data.checks import check_characters
from mlx_dora.data.dataset import RowDataset, describe_columns
from mlx_dora.data.formats import TOKENS
from mlx_dora.data.messages import parsed_arguments
from mlx_dora.data.preference_rows import (
    Answers,
    is_paired,
    label_of,
    read_answers,
    required_columns,
    title_of,
)
from mlx_dora.data.rows import Rows
from mlx_dora.data.targets import Example, IncompleteSpans
from mlx_dora.data.turns import TemplateRefusal, answer_start, shared
from mlx_dora.errors import DoRAError

logger = logging.getLogger(__name__)


class AnswerDataset(RowDataset):
    """Answers to prompts, tokenized on first use; only the answer counts in the loss.

    Rows are read as TRL reads them: messages through the chat template, text as it
    stands, with the end-of-text token after the answer. All rows are checked when the
    data set is made.

    Args:
        rows: The rows.
        tokenizer: mlx-lm's tokenizer.

    Raises:
        DoRAError: If a row is malformed; names the file, line and problem.
    """

    noun = ""
    """What the examples are, for messages."""

    def __init__(self, rows: Rows, tokenizer: Any) -> None:
        if not len(rows.values):
            raise DoRAError(f"{rows.source} has no rows.")
        self.rows = rows
        self._tokenizer = tokenizer
        self._warned = False
        self._chat = ChatTemplate(rows, TOKENS, tokenizer)
        self._columns = required_columns(rows, self._wants_pairs(rows))
        self._answers = [self._read(index) for index in range(len(rows.values))]
        self._places = self._examples()
        self._cache: list[Example | None] = [None] * len(self._places)
        if self._places:
            self[0]

    def _wants_pairs(self, rows: Rows) -> bool:
        """Whether rows hold two answers."""
        raise NotImplementedError

    def _examples(self) -> list[tuple[int, str]]:
        """Row and column of each example."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Example:
        example = self._cache[index]
        if example is None:
            example = self._cache[index] = self._encode(*self._places[index])
        return example

    @property
    def reading(self) -> str:
        """How rows are read: their format, and the columns used and not used."""
        title = title_of(self._answers[0], self.noun)
        first = self.rows.values[0]
        more = {"tools", self.rows.config.prompt_feature} - {*self._columns}
        return describe_columns(title, first, self._columns, sorted(more))

    def where(self, index: int) -> str:
        """Name an example by file, line and column, for use in messages."""
        row, column = self._places[index]
        return f"{self.rows.where(row)} ({column})"

    def _read(self, index: int) -> Answers:
        row, where = self.rows.values[index], self.rows.where(index)
        if not isinstance(row, Mapping):
            came = type(row).__name__
            raise DoRAError(
                f"{where}: expected a mapping with the keys "
                f"{', '.join(map(repr, self._columns))}, got a {came}."
            )
        answers = read_answers(row, self._columns, self.rows.config, where)
        if answers.is_chat:
            for messages in answers.conversations():
                parsed_arguments(messages, where)
        for key in (self.rows.config.prompt_feature, *self._columns):
            check_characters(self.rows, index, key)
        return answers

    def _encode(self, row: int, column: str) -> Example:
        answers = self._answers[row]
        answer = answers.answers[column]
        if answers.is_chat:
            return self._encode_chat(row, answers.prompt, answer)
        prompt = list(self._tokenizer.encode(answers.prompt))
        end = self._tokenizer.eos_token_id
        start, tokens = len(prompt), []
        for name, text in answers.answers.items():
            whole = list(self._tokenizer.encode(answers.prompt + text))
            start = min(start, shared(prompt, whole))
            if name == column:
                tokens = whole
        if start < len(prompt) and not self._warned:
            self._warned = True
            logger.warning(
                "%s: the last tokens of the prompt change when an answer follows, so "
                "answers start after the %d of %d tokens that they share: do not end a "
                "prompt with a space",
                self.rows.where(row),
                start,
                len(prompt),
            )
        return (tokens if end in (None, *tokens[-1:]) else [*tokens, end]), start

    def _encode_chat(self, row: int, prompt: Any, answer: Any) -> Example:
        where = self.rows.where(row)
        messages = parsed_arguments([*prompt, *answer], where)
        tokens = self._chat.tokens(row, messages)
        render = partial(self._chat.tokens, row)
        try:
            start, _ = answer_start(render, messages, len(prompt), tokens)
        except TemplateRefusal:
            start = None
        return tokens, IncompleteSpans() if start is None else start


class PairDataset(AnswerDataset):
    """Chosen and rejected answers: examples 2i and 2i + 1 are a pair.

    Pairs whose two answers are equal teach nothing and are left out, with a warning.
    """

    noun = "preferences"
    serves = ("dpo", "orpo", "simpo")

    def _wants_pairs(self, rows: Rows) -> bool:
        return True

    def _examples(self) -> list[tuple[int, str]]:
        equal = [
            index
            for index, answers in enumerate(self._answers)
            if answers.answers["chosen"] == answers.answers["rejected"]
        ]
        if len(equal) == len(self._answers):
            raise DoRAError(
                f"{self.rows.source}: chosen equals rejected in every row: there is "
                "nothing to prefer."
            )
        if equal:
            logger.warning(
                "%s: chosen equals rejected in %d of %d rows, which are left out (the "
                "first: %s)",
                self.rows.source,
                len(equal),
                len(self._answers),
                self.rows.where(equal[0]),
            )
        kept = sorted({*range(len(self._answers))} - {*equal})
        return [(row, column) for row in kept for column in ("chosen", "rejected")]


class LabeledDataset(AnswerDataset):
    """Answers, each desirable or not; a pair becomes one of each."""

    noun = "labeled answers"
    serves = ("kto",)

    def _wants_pairs(self, rows: Rows) -> bool:
        return is_paired(rows)

    def _examples(self) -> list[tuple[int, str]]:
        places = [
            (row, column)
            for row, answers in enumerate(self._answers)
            for column in answers.answers
        ]
        self._labels = [self._label(row, column) for row, column in places]
        return places

    def _label(self, row: int, column: str) -> bool:
        if column in ("chosen", "rejected"):
            return column == "chosen"
        return label_of(self.rows.values[row], self.rows.where(row))

    def label(self, index: int) -> bool:
        """Whether an answer is desirable."""
        return self._labels[index]
