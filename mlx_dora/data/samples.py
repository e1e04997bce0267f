"""The text of a row, divided into what is trained, only read, or cut off."""

from dataclasses import dataclass
from typing import Any, Literal

from mlx_dora.data.targets import Example, target_spans

Kind = Literal["context", "target", "cut"]


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A stretch of a row's text.

    Args:
        kind: ``"target"`` if it counts in the loss, ``"context"`` if it does not, and
            ``"cut"`` beyond the maximum length.
        text: The text, with special tokens as text.
    """

    kind: Kind
    text: str


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A row as it would be trained.

    Args:
        where: File and line of the row.
        tokens: Number of tokens before cutting.
        pieces: The row's text, in order.
    """

    where: str
    tokens: int
    pieces: tuple[Piece, ...]


def sample(example: Example, where: str, tokenizer: Any, max_seq_length: int) -> Sample:
    """Divide a row's text at the borders of its targets.

    Args:
        example: The row's tokens and targets.
        where: File and line of the row.
        tokenizer: mlx-lm's tokenizer.
        max_seq_length: Number of tokens after which the row is cut.
    """
    tokens, targets = example
    most = min(len(tokens), max_seq_length)
    borders: list[tuple[int, Kind]] = []
    for start, end in target_spans(targets, most):
        borders.extend(((start, "context"), (end, "target")))
    borders.extend(((most, "context"), (len(tokens), "cut")))
    pieces, before = [], ""
    for end, kind in borders:
        # Tokens are decoded from the start: a character may span several tokens.
        text = tokenizer.decode(tokens[:end])
        if end < len(tokens):
            text = text.rstrip("\ufffd")
        if len(text) > len(before):
            pieces.append(Piece(kind=kind, text=text[len(before) :]))
            before = text
    return Sample(where=where, tokens=len(tokens), pieces=tuple(pieces))
