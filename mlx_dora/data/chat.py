"""Rows of messages as a tokenizer's chat template writes them."""

import logging
from functools import partial
from typing import Any

from mlx_dora.data.checks import Kind
from mlx_dora.data.messages import missing_content, parsed_arguments
from mlx_dora.data.rows import Rows
from mlx_dora.data.targets import IncompleteSpans, Spans
from mlx_dora.data.turns import TemplateRefusal, answer_span, answer_start

logger = logging.getLogger(__name__)


class ChatTemplate:
    """Writes the rows of a data set as tokens and finds the answers among them.

    Args:
        rows: Rows with messages, or with prompts and completions.
        kind: Which of the two.
        tokenizer: mlx-lm's tokenizer.
    """

    def __init__(self, rows: Rows, kind: Kind, tokenizer: Any) -> None:
        self.rows = rows
        self.kind = kind
        self._tokenizer = tokenizer
        self._warned_of_header = False
        self._takes_objects: bool | None = None  # as arguments of tool calls

    def messages(self, index: int) -> list[Any]:
        """The messages of a row; the two of a prompt and its completion."""
        row, config = self.rows.values[index], self.rows.config
        if self.kind == "completions":
            return [
                {"role": "user", "content": row[config.prompt_feature]},
                {"role": "assistant", "content": row[config.completion_feature]},
            ]
        return self._chat(index)

    def _chat(self, index: int) -> list[Any]:
        """A chat with its tool calls in the form that the template takes."""
        written = list(self.rows.values[index][self.rows.config.chat_feature])
        parsed = parsed_arguments(written, self.rows.where(index))
        if parsed == written or self._takes_objects:
            return parsed
        if self._takes_objects is None:
            try:
                self.tokens(index, parsed, False)
            except TemplateRefusal:  # a few templates join the text to other text
                self.tokens(index, written, False)
                self._takes_objects = False
                return written
            self._takes_objects = True
            return parsed
        return written

    def turns(self, index: int, messages: list[Any], tokens: list[int]) -> Spans:
        """Where the assistant's turns stand in a row's tokens."""
        places = [i for i, m in enumerate(messages) if m.get("role") == "assistant"]
        spans = []
        for place in places:
            try:
                span, differs = answer_span(
                    partial(self.tokens, index), messages, place, tokens
                )
            except TemplateRefusal:  # of a part of the row; it takes the whole
                continue
            if differs and span is not None:
                self._warn_of_header(index, span[0])
            if span is not None:
                spans.append(span)
        is_whole = len(spans) == len(places)
        return tuple(spans) if is_whole else IncompleteSpans(spans)

    def start(self, index: int, messages: list[Any], tokens: list[int]) -> int | None:
        """Where the last turn's answer starts; None if the template hides it."""
        try:
            start, differs = answer_start(
                partial(self.tokens, index), messages, len(messages) - 1, tokens
            )
        except TemplateRefusal:
            return None
        if differs and start is not None:
            self._warn_of_header(index, start)
        return start

    def tokens(
        self, index: int, messages: list[Any], generation: bool = False
    ) -> list[int]:
        """Write messages as tokens; with `generation`, the header of an answer too.

        Raises:
            TemplateRefusal: If the template does not take them.
        """
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
                f"{self.rows.where(index)}: the model's chat template does not take "
                f"this row{missing_content(messages)}: {reason}"
            ) from error

    def _warn_of_header(self, index: int, start: int) -> None:
        if not self._warned_of_header:
            self._warned_of_header = True
            logger.warning(
                "%s: the chat template starts this answer differently from a new "
                "answer; targets start after the %d tokens that both share",
                self.rows.where(index),
                start,
            )
