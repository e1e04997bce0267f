"""Activations of the frozen first blocks of a Llama-like model, computed once per row.

If only the last blocks learn, the other blocks give the same output for the same row in
every step, method and learning rate. Rows are padded on the right and attention is
causal, so a row's activations do not depend on the other rows of its batch. Tokens that
all rows of a batch begin with (the chat template's system prompt) are computed once.
The head is computed only at the positions of targets.
"""

import itertools
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
"""Tokens of a row, and the index of its first target."""


def endless_batches(make: Callable[[Sequence[Row]], Any]) -> Callable[..., Any]:
    """Return a batches function for `finetune`, whose batches are made of plain rows.

    Args:
        make: Makes a batch of some rows.
    """

    def batches(
        data: Any, size: int, limit: int, *, seed: int, counts: Any
    ) -> Iterator[Any]:
        schedule = Schedule(data, size, limit, seed=seed, counts=counts)
        for number in itertools.count():
            for rows in schedule.epoch(number):
                yield make([data[row[0]] for row in rows])

    return batches


class Trunk:
    """Remembers the activations behind the frozen blocks.

    Args:
        model: The model, whose frozen blocks must not change.
        frozen: Number of frozen blocks.
    """

    def __init__(self, model: Any, frozen: int) -> None:
        self._inner = model.model
        self.frozen = frozen
        self._known: dict[tuple[int, ...], np.ndarray] = {}

    def activations(self, texts: Sequence[Sequence[int]]) -> mx.array:
        """Return activations (rows, longest, width) of token rows, padded with 0."""
        keys = [tuple(text) for text in texts]
        new = [key for key in keys if key not in self._known]
        if new:
            tokens, _ = pad_batch([([*key], 0) for key in new], 1 << 30)
            blocks = self._inner.layers[: self.frozen]
            hidden = np.array(
                run_rows(blocks, self._inner.embed_tokens(tokens), shared_tokens(new))
            )
            for row, key in enumerate(new):
                self._known[key] = hidden[row, : len(key)].copy()
        stored = [self._known[key] for key in keys]
        width = stored[0].shape[1]
        padded = np.zeros((len(stored), max(map(len, stored)), width), "f4")
        for row, values in enumerate(stored):
            padded[row, : len(values)] = values
        return mx.array(padded)

    def batch(self, rows: Sequence[Row]) -> tuple[tuple[mx.array, ...], mx.array]:
        """Return activations, targets and places, and the lengths of `pad_batch`.

        The place of a target is the position of the token before it.
        """
        _, lengths = pad_batch([*rows], 1 << 30)
        hidden = self.activations([tokens[:-1] for tokens, _ in rows])
        most = max(len(tokens) - first for tokens, first in rows)
        most = -(-most // 4) * 4  # few shapes, since each is compiled
        targets = np.zeros((len(rows), most), np.int32)
        places = np.zeros((len(rows), most), np.int32)
        for i, (tokens, first) in enumerate(rows):
            count = len(tokens) - first
            targets[i, :count] = tokens[first:]
            places[i, :count] = np.arange(first - 1, len(tokens) - 1)
        return (hidden, mx.array(targets), mx.array(places)), lengths

    def batches(self) -> Callable[..., Iterator[Any]]:
        """Return the batches function for `finetune`, for use with `target_loss`."""
        return endless_batches(self.batch)


class SharedPrefix:
    """Keys and values of the tokens that all rows begin with, for one block.

    An attention cache: the first call keeps the keys and values of one row, and later
    calls put them before those of every row, without keeping more.

    Attributes:
        offset: Number of shared tokens.
    """

    def __init__(self) -> None:
        self.offset = 0
        self._kept: tuple[mx.array, mx.array] | None = None

    def update_and_fetch(
        self, keys: mx.array, values: mx.array
    ) -> tuple[mx.array, mx.array]:
        """Return keys and values, both ``(rows, heads, tokens, width)``."""
        if self._kept is None:
            self._kept, self.offset = (keys, values), keys.shape[2]
            return keys, values
        first, second = (
            mx.concatenate(
                [mx.broadcast_to(kept, (new.shape[0], *kept.shape[1:])), new], axis=2
            )
            for kept, new in zip(self._kept, (keys, values), strict=True)
        )
        return first, second


def shared_tokens(texts: Sequence[Sequence[int]]) -> int:
    """Count the tokens that all rows begin with, but for the last of each row."""
    most = min(map(len, texts)) - 1
    columns = zip(*(text[:most] for text in texts), strict=True)
    return next((i for i, tokens in enumerate(columns) if len({*tokens}) > 1), most)


def run_blocks(
    blocks: Sequence[nn.Module],
    hidden: mx.array,
    prefixes: Sequence[SharedPrefix] | None = None,
) -> mx.array:
    """Run some blocks with causal attention, after the shared prefix of each block."""
    for block, prefix in zip(blocks, prefixes or [None] * len(blocks), strict=True):
        hidden = block(hidden, "causal", prefix)
    return hidden


def run_rows(blocks: Sequence[nn.Module], hidden: mx.array, shared: int) -> mx.array:
    """Run blocks on rows ``(rows, tokens, width)`` that share their first tokens.

    The `shared` first tokens are computed for one row, and repeated in the result.
    """
    rows, _, width = hidden.shape
    if rows == 1 or not shared:
        return run_blocks(blocks, hidden)
    prefixes = [SharedPrefix() for _ in blocks]
    first = run_blocks(blocks, hidden[:1, :shared], prefixes)
    rest = run_blocks(blocks, hidden[:, shared:], prefixes)
    return mx.concatenate([mx.broadcast_to(first, (rows, shared, width)), rest], axis=1)


def next_token_logits(
    model: Any, frozen: int, hidden: mx.array, places: mx.array
) -> mx.array:
    """Return logits at `places` (rows, n) from activations behind the trunk."""
    inner = model.model
    last = run_blocks(inner.layers[frozen:], hidden)
    rows = mx.arange(hidden.shape[0])[:, None]
    return inner.embed_tokens.as_linear(inner.norm(last[rows, places]))


def target_loss(frozen: int) -> Loss:
    """Return the usual loss function, for batches of a `Trunk`."""

    def loss(model: Any, batch: Any, lengths: mx.array) -> tuple[mx.array, mx.array]:
        hidden, targets, places = batch
        logits = next_token_logits(model, frozen, hidden, places)
        mask = mx.arange(targets.shape[1]) < lengths[:, 1:] - lengths[:, :1]
        losses = mx.where(mask, nn.losses.cross_entropy(logits, targets), 0.0)
        count = mask.sum()
        return losses.sum() / mx.maximum(count, 1), count

    return loss


def mean_loss(model: Any, trunk: Trunk, rows: Sequence[Row]) -> float:
    """Return the mean loss of the rows' targets.

    Logits are computed at the places of targets only, and the tokens that all rows
    begin with once.
    """
    total, count = 0.0, 0
    ordered = sorted(rows, key=lambda row: len(row[0]))
    blocks = model.model.layers[trunk.frozen :]
    shared = min(shared_tokens([t for t, _ in rows]), min(f for _, f in rows) - 1)
    prefixes = [SharedPrefix() for _ in blocks] if shared else None
    with eval_mode(model):
        if prefixes is not None:
            start = trunk.activations([ordered[0][0][:-1]])[:, :shared]
            run_blocks(blocks, start, prefixes)
        for some in batched(ordered, 8):
            hidden = trunk.activations([tokens[:-1] for tokens, _ in some])
            last = run_blocks(blocks, hidden[:, shared:], prefixes)
            places = [
                last[row, first - 1 - shared : len(tokens) - 1 - shared]
                for row, (tokens, first) in enumerate(some)
            ]
            targets = mx.array([t for tokens, first in some for t in tokens[first:]])
            logits = model.model.embed_tokens.as_linear(
                model.model.norm(mx.concatenate(places))
            )
            total += float(nn.losses.cross_entropy(logits, targets).sum())
            count += targets.size
    return total / count


def batched(rows: Sequence[Row], size: int) -> Iterator[Sequence[Row]]:
    """Yield the rows, `size` at a time."""
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def count_targets(rows: Sequence[Row]) -> int:
    """Count the targets of rows."""
    return sum(len(tokens) - first for tokens, first in rows)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Mean loss per target, and the share of targets or labels predicted right."""

    loss: float
    accuracy: float


def measure(
    model: Any, trunk: Trunk, rows: Sequence[Row], labels: Sequence[int] | None = None
) -> Measured:
    """Measure loss and accuracy on rows, 16 at a time.

    Args:
        model: A model with the trunk's frozen blocks.
        trunk: The trunk that remembers the activations.
        rows: The rows to measure.
        labels: First token of each label, if the answers are labels. Accuracy is then
            the share of rows whose own label ranks highest among the labels. Otherwise
            it is the share of targets that rank highest among all tokens.
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
