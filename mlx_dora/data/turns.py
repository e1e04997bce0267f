"""Locates the answers of a chat in its tokens."""

from collections.abc import Callable, Sequence
from typing import Any

from mlx_dora.errors import DoRAError

Render = Callable[[list[Any], bool], list[int]]
"""``(messages, append_answer_header) -> tokens``."""

_PROBES = ("x", "7")  # texts with different starts and ends


class TemplateRefusal(DoRAError):
    """A chat template rejects some messages."""


def answer_start(
    render: Render, messages: list[Any], place: int, tokens: list[int]
) -> tuple[int | None, bool]:
    """Find where the answer ``messages[place]`` starts in the chat's tokens.

    The answer starts after the earlier messages and the header that the template
    writes before the answer. If there are no earlier messages, or the template renders
    them differently when this answer follows, the answer starts at the first token
    that depends on its text.

    Returns:
        The position, or None if the row does not show the answer; and whether the
        template writes a different header here than before a new answer (the answer
        then starts after the tokens that both headers share).
    """
    before = messages[:place]
    if not before:
        return _unchanged(render, messages, place, tokens)[0], False
    generation = messages[place].get("role") == "assistant"
    prompt = render(before, generation)
    start = shared(prompt, tokens)
    if start == min(len(prompt), len(tokens)):
        return start, False
    if generation and _starts_with(tokens, render, before):
        return start, True
    return _unchanged(render, messages, place, tokens)[0], False


def answer_span(
    render: Render, messages: list[Any], place: int, tokens: list[int]
) -> tuple[tuple[int, int] | None, bool]:
    """Find the span of the answer ``messages[place]``, including its end of turn.

    Returns:
        ``(start, end)``, or None if the row does not show the answer; and whether the
        header differs, as in `answer_start`.
    """
    start, differs = answer_start(render, messages, place, tokens)
    if start is None:
        return None, differs
    until = render(messages[: place + 1], False)
    if until == tokens[: len(until)]:
        return (start, len(until)), differs
    # Templates of thinking models render an answer differently if others follow it.
    before, after = _unchanged(render, messages, place, tokens)
    if before is None:
        return None, differs
    end = max(before, len(tokens) - after)
    _, rest = _unchanged(render, messages[: place + 1], place, until)
    end += shared(until[len(until) - rest :], tokens[end:])
    return (start, end), differs


def _unchanged(
    render: Render, messages: list[Any], place: int, tokens: list[int]
) -> tuple[int | None, int]:
    """Count the tokens before and after an answer that do not depend on its text.

    The count before is None if no token depends on the text, that is, if the template
    leaves the answer out.
    """
    before = after = len(tokens)
    for text in _PROBES:
        answer = {"role": messages[place].get("role"), "content": text}
        other = render([*messages[:place], answer, *messages[place + 1 :]], False)
        before = min(before, shared(tokens, other))
        after = min(after, shared(tokens[::-1], other[::-1]))
    return (None, 0) if before == len(tokens) else (before, after)


def _starts_with(tokens: list[int], render: Render, messages: list[Any]) -> bool:
    """Whether the rendered messages are a prefix of the chat's tokens."""
    try:
        bare = render(messages, False)
    except TemplateRefusal:  # accepts the messages only with an answer
        return True
    return bare == tokens[: len(bare)]


def shared(first: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common prefix of two sequences."""
    pairs = enumerate(zip(first, other, strict=False))
    differ = (place for place, (a, b) in pairs if a != b)
    return next(differ, min(len(first), len(other)))
