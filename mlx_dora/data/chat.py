"""Renders rows of messages with a tokenizer's chat template."""

import logging
from functools import partial
from typing import Any

from mlx_dora.data.formats import Format
from mlx_dora.data.messages import missing_content, parsed_arguments
from mlx_dora.data.rows import Rows
from mlx_dora.data.targets import IncompleteSpans, Spans
from mlx_dora.data.turns import TemplateRefusal, answer_span, answer_start
from mlx_dora.io.json import parse

logger = logging.getLogger(__name__)


class ChatTemplate:
    """Renders the rows of a data set as tokens and locates the answers in them.

    Args:
        rows: The rows.
        format: Format of the rows.
        tokenizer: mlx-lm's tokenizer.
    """

    def __init__(self, rows: Rows, format: Format, tokenizer: Any) -> None:
        self.rows = rows
        self._format = format
        self._tokenizer = tokenizer
        self._warned_of_header = False
        self._takes_objects: bool | None = None  # tool call arguments; None: unknown

    def messages(self, index: int) -> list[Any]:
        """The messages of a row, tool calls in the form that the template accepts."""
        rows, where = self.rows, self.rows.where(index)
        written = self._format.messages(rows.values[index], rows.config, where)
        parsed = parsed_arguments(written, where)
        if parsed == written or self._takes_objects:
            return parsed
        if self._takes_objects is None:
            try:
                self.tokens(index, parsed, False)
            except TemplateRefusal:  # a few templates require text
                self.tokens(index, written, False)
                self._takes_objects = False
                return written
            self._takes_objects = True
            return parsed
        return written

    def turns(self, index: int, messages: list[Any], tokens: list[int]) -> Spans:
        """Locate the assistant's turns in the tokens of a row."""
        places = [i for i, m in enumerate(messages) if m.get("role") == "assistant"]
        spans = []
        for place in places:
            try:
                span, differs = answer_span(
                    partial(self.tokens, index), messages, place, tokens
                )
            except TemplateRefusal:  # the template accepts only the whole row
                continue
            if differs and span is not None:
                self._warn_of_header(index, span[0])
            if span is not None:
                spans.append(span)
        is_whole = len(spans) == len(places)
        return tuple(spans) if is_whole else IncompleteSpans(spans)

    def start(self, index: int, messages: list[Any], tokens: list[int]) -> int | None:
        """Start of the last answer; None if the template does not show it."""
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
        """Render messages as tokens; `generation` appends the header of a new answer.

        Raises:
            TemplateRefusal: If the template rejects the messages.
        """
        import jinja2

        try:
            return self._tokenizer.apply_chat_template(
                messages,
                tools=self._tools(index),
                add_generation_prompt=generation,
                return_dict=False,
            )
        except (ValueError, TypeError, jinja2.TemplateError) as error:
            reason = " ".join(str(error).split())
            raise TemplateRefusal(
                f"{self.rows.where(index)}: the model's chat template rejects "
                f"this row{missing_content(messages)}: {reason}"
            ) from error

    def _tools(self, index: int) -> Any:
        """Definitions of tools, which tables hold as JSON text."""
        tools = self.rows.values[index].get("tools")
        if not isinstance(tools, str):
            return tools
        return parse(tools, f"{self.rows.where(index)}: 'tools'") if tools else None

    def _warn_of_header(self, index: int, start: int) -> None:
        if not self._warned_of_header:
            self._warned_of_header = True
            logger.warning(
                "%s: the chat template begins this answer differently than a newly "
                "generated answer; targets start after the %d tokens they share",
                self.rows.where(index),
                start,
            )
