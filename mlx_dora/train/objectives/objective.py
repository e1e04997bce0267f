"""What an objective gives to a training: data, batches, loss, metrics, validation.

The loop knows none of them. It takes batches from `Schedule`, passes each through
`Objective.complete`, differentiates `Objective.loss`, and reports the sums.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_dora.adapters.config import DoRAConfig
from mlx_dora.data.batches import Batch, Examples, batches_once
from mlx_dora.data.counts import RowCounts
from mlx_dora.data.dataset import RowDataset
from mlx_dora.data.rows import Rows
from mlx_dora.errors import DoRAError
from mlx_dora.evaluate.loss import eval_mode
from mlx_dora.progress import Progress
from mlx_dora.train.config import TrainConfig

Outputs = tuple[mx.array, ...]
"""What a loss returns: ``(mean, count)``, or ``(mean, count, tokens, table)``.

``mean`` is differentiated; the mean over several batches is weighted by ``count``.
``tokens`` is the number of targets. ``table`` (metrics, 2) holds the sum and the weight
of each of `Objective.metrics`, whose value is sum over weight.
"""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """An objective on a data set.

    Args:
        loss: Mean loss.
        count: Number of what the loss is a mean of: target tokens, or pairs.
        tokens: Number of target tokens.
        rows: Number of rows read.
        rows_truncated: Number of rows truncated.
        rows_skipped: Number of rows skipped because they have no target.
        metrics: The objective's metrics by name.
    """

    loss: float
    count: int
    tokens: int
    rows: int
    rows_truncated: int = 0
    rows_skipped: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def perplexity(self) -> float:
        """Exponential of a cross-entropy; infinity if it overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """Where an objective works, known once the model is adapted.

    Args:
        model: The model, made trainable, with the weights it starts from: those of a
            checkpoint are not loaded yet.
        train: Settings of the training.
        folder: Folder of the adapter.
        group: The processes that share each batch. Only the first writes files.
        base: Fingerprint of the base model.
        train_set: The training data.
        valid_set: The validation data, or None.
        tokenizer: Tokenizer of the model.
        progress: Called during work before the first step, or None.
    """

    model: nn.Module
    train: TrainConfig
    folder: Path
    group: mx.distributed.Group
    base: str
    train_set: Examples
    valid_set: Examples | None
    tokenizer: Any
    progress: Progress | None = None


class Objective:
    """What a training minimizes. A subclass is one objective, in one file.

    Attributes:
        name: Value of ``--objective``.
        unit: Number of consecutive examples that stay together in a batch; None for
            batches of single rows without indices.
        what: What the loss is a mean over, for messages.
        metrics: Names of the metrics in the table that `loss` returns.
        rows_per_unit: Rows that a training step computes for each unit.
        passes: How often the batches of an update are used, in consecutive updates.
            Checkpoints are written after the last.
        added_tokens: Most tokens that a training step adds to an example.
    """

    name: ClassVar[str]
    unit: ClassVar[int | None] = None
    what: ClassVar[str] = "target tokens"
    metrics: tuple[str, ...] = ()
    rows_per_unit: int = 1
    passes: int = 1
    added_tokens: int = 0

    # 1. Before the model is loaded.

    def check(self, train: TrainConfig, dora: DoRAConfig) -> None:
        """Refuse settings that do not go together.

        Raises:
            DoRAError: Names the setting, and what to do.
        """

    def dataset(self, rows: Rows, tokenizer: Any) -> RowDataset:
        """Make the examples of a source.

        Raises:
            DoRAError: If a row is malformed; names the file, line and problem.
        """
        raise NotImplementedError

    def check_data(self, data: RowDataset, name: str) -> None:
        """Refuse a data set that was made for another objective.

        Raises:
            DoRAError: Names both.
        """
        if data.serves and self.name not in data.serves:
            raise DoRAError(
                f"{name} was read for objective {' or '.join(data.serves)}, not "
                f"{self.name}: pass the rows themselves."
            )

    def limited(self, data: RowDataset, max_seq_length: int) -> RowDataset:
        """The data with long rows cut, where that is not done at the end of a row."""
        return data

    # 2. Before the first step.

    def adapting(self, model: nn.Module) -> None:
        """Look at the model before it is adapted, for example to keep a reference."""

    def begin(self, around: Surroundings) -> None:
        """Prepare for the first step; called once, before a checkpoint is loaded."""

    def settings(self, data: Examples) -> dict[str, Any]:
        """Facts that must be unchanged when a run is resumed, as JSON values.

        Args:
            data: The training data, whose tokens and targets are compared anyway.
        """
        return {}

    def summary(self) -> dict[str, Any]:
        """Facts that the adapter records about its training."""
        return {}

    def held_bytes(self, train: TrainConfig, trained: int) -> int:
        """Bytes held during the whole training, beside those of an SFT.

        Args:
            train: Settings of the training.
            trained: Bytes of the trained parameters.
        """
        return 0

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the objective, as JSON values."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from the `state` of a checkpoint; called in every process."""

    def step_shapes(self, shape: tuple[int, ...]) -> Iterable[tuple[int, ...]]:
        """Shapes that a batch of tokens of this shape may have once completed."""
        return (shape,)

    # 3. Each step.

    def complete(self, model: nn.Module, data: Examples, batch: Batch) -> Batch:
        """Add to a batch what is computed without a gradient, and evaluate it.

        Args:
            model: The model, in train mode or in eval mode.
            data: The examples that the batch's indices refer to.
            batch: Tokens, marks and, with `unit`, the indices of the examples.

        Returns:
            The arrays that `loss` takes. Their shapes decide how often a compiled step
            is traced.
        """
        return batch

    def completed(
        self, model: nn.Module, data: Examples, window: Sequence[Batch]
    ) -> Iterable[Batch]:
        """The completed batches of an update, each when it is needed."""
        return (self.complete(model, data, batch) for batch in window)

    def loss(self, model: nn.Module, *batch: mx.array) -> Outputs:
        """The loss of a completed batch; compiled in training."""
        raise NotImplementedError

    def derived(self, metrics: dict[str, float]) -> dict[str, float]:
        """Add metrics that are functions of others."""
        return metrics

    # 4. At validations.

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
        """Measure the objective in eval mode on rows spread evenly over the data.

        Args:
            model: The model.
            data: The examples.
            train: Settings of the training.
            num_batches: Number of batches; -1 for all rows.
            progress: Called after each batch with its number of examples, to which the
                first batch adds those that were skipped.
            group: Processes that share the batches; each gets the overall result.
        """
        rank, ranks = (0, 1) if group is None else (group.rank(), group.size())
        counts, sums = RowCounts(), np.zeros(3 + 2 * len(self.metrics))
        with eval_mode(model):
            batches = batches_once(
                data,
                train.batch_size,
                train.max_seq_length,
                num_batches,
                counts,
                train.batch_tokens,
                self.unit,
            )
            for number, batch in enumerate(batches):
                if number % ranks == rank:
                    completed = self.complete(model, data, batch)
                    outputs = self.loss(model, *completed)
                    mx.eval(outputs)
                    sums += self._sums(outputs)
                if progress is not None:
                    progress(batch[0].shape[0] + (0 if number else counts.skipped))
        if ranks > 1:
            sums = _shared(sums, group)
        loss, count, tokens, *table = sums.tolist()
        return Measured(
            loss=loss / max(count, 1),
            count=round(count),
            tokens=round(tokens),
            rows=counts.rows,
            rows_truncated=counts.truncated,
            rows_skipped=counts.skipped,
            metrics=self.values(table),
        )

    def score(self, measured: Measured) -> float:
        """The number by which the best adapter is chosen; lower is better."""
        return measured.loss

    # 5. For all.

    def values(self, table: Sequence[float]) -> dict[str, float]:
        """The metrics of a table of sums and weights, given as a flat list."""
        pairs = zip(table[::2], table[1::2], strict=True)
        named = zip(self.metrics, pairs, strict=True) if table else ()
        return self.derived(
            {name: total / weight for name, (total, weight) in named if weight}
        )

    def _sums(self, outputs: Outputs) -> np.ndarray:
        """Sums of a batch in float64: of its losses, counts, tokens and table."""
        mean, count, tokens, table = outputs
        parts = (float(mean) * float(count), float(count), float(tokens))
        return np.concatenate([parts, np.array(table, np.float64).reshape(-1)])


def _shared(sums: np.ndarray, group: mx.distributed.Group | None) -> np.ndarray:
    """Sum float64 numbers over processes, each split into two of float32."""
    high = sums.astype(np.float32)
    low = (sums - high).astype(np.float32)
    parts = mx.distributed.all_gather(
        mx.array(np.stack([high, low]))[None], group=group
    )
    return np.array(parts).astype(np.float64).sum(axis=(0, 1))


def metric_table(*entries: tuple[mx.array, mx.array]) -> mx.array:
    """A table of metrics from their values and weights.

    Args:
        *entries: For each metric, its values (any shape) and their weights: a mask, or
            numbers that broadcast to it.

    Returns:
        Sum and weight of each. Float32 ``(metrics, 2)``, without a gradient.
    """
    rows = []
    for values, weights in entries:
        weights = mx.broadcast_to(weights.astype(mx.float32), values.shape)
        total = mx.where(weights > 0, values.astype(mx.float32) * weights, 0.0).sum()
        rows.append(mx.stack([total, weights.sum()]))
    return mx.stop_gradient(mx.stack(rows))
