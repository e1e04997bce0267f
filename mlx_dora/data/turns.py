"""Where the answers of a chat are among its tokens."""

from collections.abc import Callable, Sequence
from typing import Any

from mlx_dora.errors import DoRAError

Render = Callable[[list[Any], bool], list[int]]
"""Messages, and whether the header of an answer follows them, to tokens."""

_PROBES = ("x", "7")  # two texts that share neither their start nor their end


class TemplateRefusal(DoRAError):
    """A chat template does not take some messages."""


def answer_start(
    render: Render, messages: list[Any], place: int, tokens: list[int]
) -> tuple[int | None, bool]:
    """Find where the answer ``messages[place]`` starts among the chat's tokens.

    That is the end of what precedes the answer and of the header that the template
    writes before it. Where nothing precedes it, or where the template writes earlier
    turns differently once this one follows them, the answer starts at the first token
    that depends on its text.

    Returns:
        The position, None if the row does not show the answer at all; and whether the
        template writes the header of this answer otherwise than that of a new one (the
        answer then starts after what the two share).
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
    """Find the span of the answer ``messages[place]``, the end of its turn included.

    Returns:
        ``(start, end)``, or None if the row does not show the answer; and, as
        `answer_start`, whether its header is written otherwise.
    """
    start, differs = answer_start(render, messages, place, tokens)
    if start is None:
        return None, differs
    until = render(messages[: place + 1], False)
    if until == tokens[: len(until)]:
        return (start, len(until)), differs
    # Templates of thinking models write an answer differently once others follow it.
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

    None before it if no token depends on it: the template leaves the answer out.
    """
    before = after = len(tokens)
    for text in _PROBES:
        answer = {"role": messages[place].get("role"), "content": text}
        other = render([*messages[:place], answer, *messages[place + 1 :]], False)
        before = min(before, shared(tokens, other))
        after = min(after, shared(tokens[::-1], other[::-1]))
    return (None, 0) if before == len(tokens) else (before, after)


def _starts_with(tokens: list[int], render: Render, messages: list[Any]) -> bool:
    """Whether the template writes these messages as the whole chat has them."""
    try:
        bare = render(messages, False)
    except TemplateRefusal:  # it takes them with an answer after them only
        return True
    return bare == tokens[: len(bare)]


def shared(one: Sequence[int], other: Sequence[int]) -> int:
    """Count the tokens with which both sequences start."""
    pairs = enumerate(zip(one, other, strict=False))
    differ = (place for place, (a, b) in pairs if a != b)
    return next(differ, min(len(one), len(other)))
