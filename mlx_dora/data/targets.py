"""Which tokens of a row may be targets."""

from collections.abc import Sequence
from typing import Any

Spans = tuple[tuple[int, int], ...]
Example = tuple[list[int], int | Spans]
"""Tokens, and their targets: all tokens from a position on, or some spans."""


class IncompleteSpans(Spans):
    """Spans of a row in which the chat template does not show every answer."""


def target_spans(targets: int | Spans, length: int) -> Spans:
    """The spans ``[start, end)`` of targets among the first `length` tokens.

    A row's first token is never a target, because nothing precedes it.
    """
    spans = ((targets, length),) if isinstance(targets, int) else targets
    cut = ((max(start, 1), min(end, length)) for start, end in spans)
    return tuple((start, end) for start, end in cut if start < end)


def count_targets(example: Example, most: int | None = None) -> int:
    """Number of targets among an example's first `most` tokens, or among all."""
    tokens, targets = example
    length = len(tokens) if most is None else min(len(tokens), most)
    return sum(end - start for start, end in target_spans(targets, length))


def token_row(row: Any) -> Example:
    """Read a row of token ids, or a pair of token ids and targets."""
    if len(row) != 2 or not isinstance(row[0], Sequence):
        return list(row), 0
    tokens, targets = row
    if isinstance(targets, Sequence):
        return list(tokens), tuple((int(a), int(b)) for a, b in targets)
    return list(tokens), int(targets)
