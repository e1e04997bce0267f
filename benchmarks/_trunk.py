"""What the frozen first blocks of a Llama-like model make of a text, computed once.

Where only the last blocks learn, the others give the same for the same row in every
step, method and learning rate. Rows are padded on the right and attention is causal, so
that a row's activations do not depend on its neighbours. The head is computed where a
target stands and nowhere else.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_dora.data.batches import pad_batch
from mlx_dora.data.schedule import Schedule
from mlx_dora.evaluate.loss import Loss, eval_mode

Row = tuple[list[int], int]
"""Tokens of a row, and the number of its first target."""


class Trunk:
    """Remembers the activations behind the frozen blocks.

    Args:
        model: Its first blocks must stay as they are.
        frozen: How many blocks those are.
    """

    def __init__(self, model: Any, frozen: int) -> None:
        self._inner = model.model
        self.frozen = frozen
        self._known: dict[tuple[int, ...], np.ndarray] = {}

    def activations(self, texts: Sequence[Sequence[int]]) -> mx.array:
        """Activations ``(rows, longest, width)`` of rows of tokens, padded with 0."""
        keys = [tuple(text) for text in texts]
        new = [key for key in keys if key not in self._known]
        if new:
            tokens, _ = pad_batch([([*key], 0) for key in new], 1 << 30)
            hidden = np.array(
                run_blocks(
                    self._inner.layers[: self.frozen], self._inner.embed_tokens(tokens)
                )
            )
            for row, key in enumerate(new):
                self._known[key] = hidden[row, : len(key)].copy()
        found = [self._known[key] for key in keys]
        padded = np.zeros((len(found), max(map(len, found)), found[0].shape[1]), "f4")
        for row, one in enumerate(found):
            padded[row, : len(one)] = one
        return mx.array(padded)

    def batch(self, rows: Sequence[Row]) -> tuple[tuple[mx.array, ...], mx.array]:
        """Activations, targets and places of some rows, and the lengths of `pad_batch`.

        A target's place is that of the token before it.
        """
        _, lengths = pad_batch([*rows], 1 << 30)
        hidden = self.activations([tokens[:-1] for tokens, _ in rows])
        most = max(len(tokens) - first for tokens, first in rows)
        most = -(-most // 4) * 4  # few shapes: each is compiled
        targets = np.zeros((len(rows), most), np.int32)
        places = np.zeros((len(rows), most), np.int32)
        for i, (tokens, first) in enumerate(rows):
            count = len(tokens) - first
            targets[i, :count] = tokens[first:]
            places[i, :count] = np.arange(first - 1, len(tokens) - 1)
        return (hidden, mx.array(targets), mx.array(places)), lengths

    def batches(self) -> Callable[..., Iterator[Any]]:
        """Batches for `finetune`, to go with `target_loss`."""

        def make(
            data: Any, size: int, limit: int, *, seed: int, counts: Any
        ) -> Iterator[Any]:
            schedule = Schedule(data, size, limit, seed=seed, counts=counts)
            number = 0
            while True:
                for rows in schedule.epoch(number):
                    yield self.batch([data[row[0]] for row in rows])
                number += 1

        return make


def run_blocks(blocks: Sequence[nn.Module], hidden: mx.array) -> mx.array:
    """Run some blocks with causal attention."""
    for block in blocks:
        hidden = block(hidden, "causal", None)
    return hidden


def next_token_logits(
    model: Any, frozen: int, hidden: mx.array, places: mx.array
) -> mx.array:
    """Logits at `places` ``(rows, n)`` from activations behind the frozen blocks."""
    inner = model.model
    last = run_blocks(inner.layers[frozen:], hidden)
    rows = mx.arange(hidden.shape[0])[:, None]
    return inner.embed_tokens.as_linear(inner.norm(last[rows, places]))


def target_loss(frozen: int) -> Loss:
    """The usual loss, on batches of a `Trunk`."""

    def loss(model: Any, batch: Any, lengths: mx.array) -> tuple[mx.array, mx.array]:
        hidden, targets, places = batch
        logits = next_token_logits(model, frozen, hidden, places)
        mask = mx.arange(targets.shape[1]) < lengths[:, 1:] - lengths[:, :1]
        losses = mx.where(mask, nn.losses.cross_entropy(logits, targets), 0.0)
        count = mask.sum()
        return losses.sum() / mx.maximum(count, 1), count

    return loss


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Of some rows: mean loss of a target, and the share found likeliest."""

    loss: float
    accuracy: float


def measure(
    model: Any, trunk: Trunk, rows: Sequence[Row], labels: Sequence[int] | None = None
) -> Measured:
    """Loss and accuracy on rows, 16 at a time.

    Args:
        model: With the trunk's frozen blocks.
        trunk: Its activations.
        rows: The rows.
        labels: First tokens of the labels, if answers are labels: accuracy is the
            share of rows whose own label is the likeliest of these. Otherwise it is the
            share of targets that are the likeliest token.
    """
    order = sorted(rows, key=lambda row: len(row[0]))
    total, right, count, places_of = 0.0, 0, 0, 0
    with eval_mode(model):
        for start in range(0, len(order), 16):
            (hidden, targets, places), lengths = trunk.batch(order[start : start + 16])
            logits = next_token_logits(model, trunk.frozen, hidden, places)
            mask = mx.arange(targets.shape[1]) < lengths[:, 1:] - lengths[:, :1]
            losses = nn.losses.cross_entropy(logits, targets)
            total += float(mx.where(mask, losses, 0.0).sum())
            count += int(mask.sum())
            if labels is None:
                hits = mask & (mx.argmax(logits, axis=-1) == targets)
                places_of += int(mask.sum())
            else:
                names = mx.array([*labels])
                hits = names[mx.argmax(logits[:, 0, names], axis=-1)] == targets[:, 0]
                places_of += hits.size
            right += int(hits.sum())
    return Measured(loss=total / count, accuracy=right / places_of)
