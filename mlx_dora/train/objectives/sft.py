"""Supervised fine-tuning: cross-entropy of the next token."""

from collections.abc import Callable
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn

from mlx_dora.data.batches import Examples
from mlx_dora.data.dataset import RowDataset, TokenDataset
from mlx_dora.data.rows import Rows
from mlx_dora.evaluate.loss import Loss, evaluate_loss, loss_fn
from mlx_dora.train.config import TrainConfig
from mlx_dora.train.objectives.objective import Measured, Objective, Outputs


class Sft(Objective):
    """Cross-entropy of the target tokens, or another loss of the same form.

    Args:
        loss: Returns the mean loss of a batch and its number of targets.
    """

    name: ClassVar[str] = "sft"

    def __init__(self, loss: Loss = loss_fn) -> None:
        self._loss = loss

    def dataset(self, rows: Rows, tokenizer: Any) -> RowDataset:
        """Make the examples of a source."""
        return TokenDataset(rows, tokenizer)

    def loss(self, model: nn.Module, *batch: mx.array) -> Outputs:
        """The mean loss of the targets, and their number."""
        return self._loss(model, *batch)

    def measure(
        self,
        model: nn.Module,
        data: Examples,
        *,
        train: TrainConfig,
        num_batches: int,
        progress: Callable[[int], None] | None,
        group: mx.distributed.Group | None,
    ) -> Measured:
        """Measure the loss with equal weight for every target token."""
        result = evaluate_loss(
            model,
            data,
            batch_size=train.batch_size,
            max_seq_length=train.max_seq_length,
            num_batches=num_batches,
            batch_tokens=train.batch_tokens,
            loss=self._loss,
            progress=progress,
            group=group,
        )
        return Measured(
            loss=result.loss,
            count=result.tokens,
            tokens=result.tokens,
            rows=result.rows,
            rows_truncated=result.rows_truncated,
            rows_skipped=result.rows_skipped,
        )
