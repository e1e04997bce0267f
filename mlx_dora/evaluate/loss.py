"""Mean loss per target token."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

import mlx.core as mx
import mlx.nn as nn

from mlx_dora.data.batches import Batch, Examples, batches_once
from mlx_dora.data.counts import RowCounts
from mlx_dora.data.documents import document_caches
from mlx_dora.errors import DoRAError
from mlx_dora.evaluate.cross_entropy import summed_loss
from mlx_dora.layers import sharded_modules
from mlx_dora.matrix.sharded import in_order

Loss = Callable[[nn.Module, mx.array, mx.array], tuple[mx.array, mx.array]]
"""``(model, tokens, marks) -> (mean loss of the targets, number of targets)``."""


_Counted = tuple[mx.array, mx.array, int]
"""A batch and the number of its rows that come from the data."""


@dataclass(frozen=True, kw_only=True)
class LossResult:
    """Loss of a model on a data set.

    Args:
        loss: Mean loss of the target tokens, in nats.
        tokens: Number of target tokens.
        rows: Number of rows read.
        rows_truncated: Number of rows truncated.
        rows_skipped: Number of rows skipped because they have no target.
    """

    loss: float
    tokens: int
    rows: int
    rows_truncated: int = 0
    rows_skipped: int = 0

    @property
    def perplexity(self) -> float:
        """Exponential of the loss; infinity if it overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


def target_mask(lengths: mx.array, positions: int) -> mx.array:
    """Mask of the target positions 1..positions of each row.

    Position t is the token of the row with index t. It is a target from the row's first
    target up to its last token. (mlx-lm counts one padding token more.)

    Args:
        lengths: First target and length per row. Shape ``(rows, 2)``.
        positions: Number of target positions.

    Returns:
        Booleans. Shape ``(rows, positions)``.
    """
    steps = mx.arange(1, positions + 1)
    return (steps >= lengths[:, 0:1]) & (steps < lengths[:, 1:])


def marked_targets(marks: mx.array, positions: int) -> mx.array:
    """Compute `target_mask` for any shape of the marks of a `Batch`."""
    if marks.ndim == 2:
        return target_mask(marks, positions)
    return marks[:, 1:, 0] > 0


def loss_fn(
    model: nn.Module, batch: mx.array, marks: mx.array
) -> tuple[mx.array, mx.array]:
    """Cross-entropy of the next token, averaged over the batch's target tokens.

    Args:
        model: Maps tokens ``(rows, length)`` to logits.
        batch: Tokens. Shape ``(rows, length)``.
        marks: Position of the first target and length of each row, ``(rows, 2)``; or
            another shape described at `Batch`. In packed rows a token sees only its
            own document (in models that `check_packable` accepts), see
            `document_caches`.

    Returns:
        The mean in float32 (0 if there is no target), and the number of targets.
    """
    inputs, targets = batch[:, :-1], batch[:, 1:]
    mask, cache = marked_targets(marks, targets.shape[1]), None
    if marks.ndim == 3 and marks.shape[-1] == 2:
        cache = document_caches(model, marks[:, :-1, 1])
    tokens = mask.sum()
    return summed_loss(model, inputs, targets, mask, cache) / mx.maximum(
        tokens, 1
    ), tokens


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode, and restore its mode afterward."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def evaluate_loss(
    model: nn.Module,
    dataset: Examples,
    *,
    batch_size: int = 4,
    max_seq_length: int = 2048,
    num_batches: int = -1,
    batch_tokens: int | None = None,
    loss: Loss = loss_fn,
    progress: Callable[[int], None] | None = None,
    group: mx.distributed.Group | None = None,
) -> LossResult:
    """Compute the loss in eval mode, with equal weight for every target token.

    Args:
        model: The model.
        dataset: The examples.
        batch_size: Rows per batch.
        max_seq_length: Rows are truncated to this many tokens.
        num_batches: Number of batches, of rows spread evenly over the data; -1 for
            all.
        batch_tokens: Group the same rows by tokens instead, see `batches_once`.
        loss: Computes the loss and token count of a batch.
        progress: Called after each batch with its number of rows, to which the first
            batch adds those that were skipped.
        group: Processes that share the batches; each gets the overall result.

    Raises:
        DoRAError: If no row has a target token.
    """
    if num_batches < -1 or num_batches == 0:
        raise DoRAError(f"num_batches must be -1 or at least 1, got {num_batches}.")
    rank, ranks = (0, 1) if group is None else (group.rank(), group.size())
    counts = RowCounts()
    total, tokens = 0.0, 0
    with eval_mode(model):
        batches = batches_once(
            dataset, batch_size, max_seq_length, num_batches, counts, batch_tokens
        )
        is_sharded = ranks > 1 and bool(sharded_modules(model))
        rounds = _of_equal_shapes(batches, ranks) if is_sharded else _counted(batches)
        for number, (batch, lengths, rows) in enumerate(rounds):
            if number % ranks == rank:
                with in_order():
                    value, count = loss(model, batch, lengths)
                mx.eval(value, count)
                total += float(value) * int(count)
                tokens += int(count)
            if progress is not None and rows:
                progress(rows + (0 if number else counts.skipped))
    if ranks > 1:
        total = float(mx.distributed.all_sum(mx.array(total), group=group))
        tokens = int(mx.distributed.all_sum(mx.array(tokens), group=group))
    return LossResult(
        loss=total / tokens,
        tokens=tokens,
        rows=counts.rows,
        rows_truncated=counts.truncated,
        rows_skipped=counts.skipped,
    )


def _counted(batches: Iterator[Batch]) -> Iterator[_Counted]:
    return ((tokens, marks, tokens.shape[0]) for tokens, marks in batches)


def _of_equal_shapes(batches: Iterator[Batch], ranks: int) -> Iterator[_Counted]:
    """Pad each round of `ranks` batches to one shape, and fill up the last round.

    Processes that divide a model's weights communicate within each pass, so that each
    needs a batch in each round, of the same shape. Added rows have no target.
    """
    while members := list(islice(batches, ranks)):
        rows = max(tokens.shape[0] for tokens, _ in members)
        width = max(tokens.shape[1] for tokens, _ in members)
        for tokens, marks in members:
            more = [(0, rows - tokens.shape[0]), (0, width - tokens.shape[1])]
            in_marks = [more[0], (0, 0)]
            if marks.ndim == 3:
                in_marks = [*more, (0, 0)]
            yield mx.pad(tokens, more), mx.pad(marks, in_marks), tokens.shape[0]
        first = mx.zeros_like(members[0][1])
        empty = mx.zeros((rows, width), members[0][0].dtype)
        shape = (rows, width if first.ndim == 3 else 2, *first.shape[2:])
        for _ in range(ranks - len(members)):
            yield empty, mx.zeros(shape, first.dtype), 0
