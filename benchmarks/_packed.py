"""The last blocks of a Llama-like model on packed rows: exact, with no token in vain.

The rows of a batch form one sequence: the tokens with which all rows of a task begin,
once, then the rest of each row, without padding. A token attends to the shared tokens
and to those of its own row. The last block needs keys and values of all tokens; its
other parts, and the head, are computed only at the tokens before targets. Frozen first
blocks give the same output in every step, so they are computed once per row.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from _trunk import Row, endless_batches

from mlx_dora.evaluate.loss import Loss

ROWS = 8
"""Rows of a batch outside training: attention grows with their square."""


class Batch(NamedTuple):
    """Packed rows; n tokens, of which t precede a target.

    Attributes:
        hidden: Output of the frozen blocks, float32, shape ``(n, width)``.
        positions: Position of each token in its row, shape ``(n,)``.
        mask: Which tokens (second axis) each token attends to, shape ``(n, n)``.
        places: Tokens before targets, shape ``(t,)``.
        targets: The targets, shape ``(t,)``.
    """

    hidden: mx.array
    positions: mx.array
    mask: mx.array
    places: mx.array
    targets: mx.array


class Packed:
    """Rows of a task, with the outputs of the frozen blocks.

    These are computed in the order of `rows`, so that their bits do not depend on the
    batches asked for later.

    Args:
        model: The model, whose frozen blocks must not change.
        frozen: Number of frozen blocks; less than all.
        rows: All rows that will be asked for.
        file: Where the outputs are kept (``.npy``); written if missing. None: nowhere.
    """

    def __init__(
        self,
        model: Any,
        frozen: int,
        rows: Sequence[Row],
        file: Path | None = None,
    ) -> None:
        columns = zip(*(tokens[: first - 1] for tokens, first in rows), strict=False)
        self._shared = len([*takewhile(lambda each: len({*each}) == 1, columns)])

        def make() -> np.ndarray:
            return self._outputs(model.model, frozen, rows)

        outputs = make() if file is None else _kept(file, make)
        ends = self._shared + np.cumsum([self._length(row) for row in rows])
        self._start, *parts = np.split(outputs, [self._shared, *ends[:-1]])
        self._known = {
            tuple(tokens): part for (tokens, _), part in zip(rows, parts, strict=True)
        }

    def batch(self, rows: Sequence[Row]) -> Batch:
        """Pack rows."""
        parts = [self._known[tuple(tokens)] for tokens, _ in rows]
        return self._packed(rows, mx.array(np.concatenate([self._start, *parts])))

    def batches(self) -> Callable[..., Iterator[Any]]:
        """Return the batches function for `finetune`, for use with `packed_loss`."""

        def make(rows: Sequence[Row]) -> tuple[Batch, mx.array]:
            batch = self.batch(rows)
            return batch, mx.array(batch.targets.size)

        return endless_batches(make)

    def _length(self, row: Row) -> int:
        return len(row[0]) - 1 - self._shared  # the last token predicts nothing

    def _packed(self, rows: Sequence[Row], hidden: mx.array) -> Batch:
        shared, lengths = self._shared, [self._length(row) for row in rows]
        starts = shared + np.cumsum([0, *lengths[:-1]])
        positions = np.arange(shared + sum(lengths))
        positions[shared:] -= np.repeat(starts - shared, lengths)
        owner = np.repeat([-1, *range(len(rows))], [shared, *lengths])
        mask = (owner == owner[:, None]) | (owner == -1)
        mask &= positions <= positions[:, None]
        places = [
            start + np.arange(first - 1 - shared, length)
            for (_, first), start, length in zip(rows, starts, lengths, strict=True)
        ]
        targets = [tokens[first:] for tokens, first in rows]
        return Batch(
            hidden,
            mx.array(positions),
            mx.array(mask),
            mx.array(np.concatenate(places)),
            mx.array(np.concatenate(targets)),
        )

    def _outputs(self, inner: Any, frozen: int, rows: Sequence[Row]) -> np.ndarray:
        """Outputs of the shared tokens, then of the rest of each row."""
        outputs: list[np.ndarray] = []
        for start in range(0, len(rows), ROWS):
            some = rows[start : start + ROWS]
            tokens = some[0][0][: self._shared]
            for row, _ in some:
                tokens = tokens + row[self._shared : -1]
            batch = self._packed(some, inner.embed_tokens(mx.array(tokens)))
            hidden = batch.hidden
            for block in inner.layers[:frozen]:
                hidden = run_block(block, hidden, batch)
            values = np.array(hidden)
            outputs.append(values[self._shared :] if outputs else values)
        return np.concatenate(outputs)


def run_block(
    block: Any, hidden: mx.array, batch: Batch, places: mx.array | None = None
) -> mx.array:
    """Run a block of mlx-lm's Llama on packed rows.

    Args:
        block: The block.
        hidden: Its input, shape ``(n, width)``.
        batch: Says which token is where and attends to which.
        places: Tokens whose output is needed, shape ``(t,)``; None for all.

    Returns:
        The output, shape ``(t, width)``.
    """
    attention, normed = block.self_attn, block.input_layernorm(hidden)
    asking, positions, mask = normed, batch.positions, batch.mask
    if places is not None:
        hidden, asking = hidden[places], normed[places]
        positions, mask = positions[places], mask[places]

    def heads(values: mx.array) -> mx.array:  # (1, heads, n, size)
        split = values.reshape(len(values), -1, attention.head_dim)
        return split.transpose(1, 0, 2)[None]

    def turned(values: mx.array, positions: mx.array) -> mx.array:
        each = heads(values)[0].transpose(1, 0, 2)[:, :, None]  # a row for each token
        return attention.rope(each, offset=positions)[:, :, 0].transpose(1, 0, 2)[None]

    mixed = mx.fast.scaled_dot_product_attention(
        turned(attention.q_proj(asking), positions),
        turned(attention.k_proj(normed), batch.positions),
        heads(attention.v_proj(normed)),
        scale=attention.scale,
        mask=mask,
    )
    mixed = mixed[0].transpose(1, 0, 2).reshape(len(hidden), -1)
    hidden = hidden + attention.o_proj(mixed)
    return hidden + block.mlp(block.post_attention_layernorm(hidden))


def target_logits(model: Any, frozen: int, batch: Batch) -> mx.array:
    """Return the logits of each target, shape ``(t, vocabulary)``."""
    inner, hidden = model.model, batch.hidden
    *first, last = inner.layers[frozen:]
    for block in first:
        hidden = run_block(block, hidden, batch)
    hidden = run_block(last, hidden, batch, batch.places)
    return inner.embed_tokens.as_linear(inner.norm(hidden))


def packed_loss(frozen: int) -> Loss:
    """Return the usual loss function, for batches of a `Packed`."""

    def loss(model: Any, batch: Any, count: mx.array) -> tuple[mx.array, mx.array]:
        packed = Batch(*batch)
        logits = target_logits(model, frozen, packed)
        return nn.losses.cross_entropy(logits, packed.targets, reduction="mean"), count

    return loss


def _kept(file: Path, make: Callable[[], np.ndarray]) -> np.ndarray:
    """Read an array, made and written if it is missing."""
    if not file.exists():
        aside = file.with_suffix(".part.npy")
        np.save(aside, make())
        aside.replace(file)
    return np.load(file)
