"""KTO (arXiv:2402.01306): answers that are desirable or not, without pairs."""

import hashlib
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_dora.adapters.config import DoRAConfig
from mlx_dora.data.batches import Batch, Examples, pad_batch
from mlx_dora.data.dataset import RowDataset
from mlx_dora.data.preferences import LabeledDataset
from mlx_dora.data.rows import Rows
from mlx_dora.data.targets import Example
from mlx_dora.errors import DoRAError
from mlx_dora.evaluate.log_probabilities import row_log_probs
from mlx_dora.train.config import TrainConfig
from mlx_dora.train.objectives.objective import Outputs, Surroundings, metric_table
from mlx_dora.train.objectives.preference import Preference, reference_log_probs


def kto_losses(
    ratios: mx.array,
    desirable: mx.array,
    divergence: mx.array,
    *,
    loss_type: str,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> mx.array:
    r"""The loss of each answer.

    With :math:`\rho = \log\pi(y|x) - \log\pi_\text{ref}(y|x)` and the divergence z, it
    is :math:`w_d(1-\sigma(\beta(\rho-z)))` of a desirable answer and
    :math:`w_u(1-\sigma(\beta(z-\rho)))` of another (Eq. 7). With
    ``apo_zero_unpaired`` (arXiv:2408.06266), z is 0.

    Args:
        ratios: ρ of each answer. Shape ``(rows,)``.
        desirable: Whether each answer is desirable. Shape ``(rows,)``.
        divergence: z, a scalar that is not differentiated.
        loss_type: ``"kto"`` or ``"apo_zero_unpaired"``.
        beta: β.
        desirable_weight: :math:`w_d`.
        undesirable_weight: :math:`w_u`.
    """
    shift = divergence if loss_type == "kto" else mx.array(0.0)
    margin = beta * (ratios - mx.stop_gradient(shift))
    return mx.where(
        desirable,
        desirable_weight * mx.sigmoid(-margin),
        undesirable_weight * mx.sigmoid(margin),
    )


def mismatched(examples: list[Example]) -> list[Example]:
    """Each prompt with the answer of the example before it; the first with the last's.

    Args:
        examples: Tokens, and the position where the answer starts.
    """
    pairs = zip(examples, [*examples[-1:], *examples[:-1]], strict=True)
    made: list[Example] = []
    for (tokens, start), (others, other_start) in pairs:
        assert isinstance(start, int) and isinstance(other_start, int)
        made.append(([*tokens[:start], *others[other_start:]], start))
    return made


class Kto(Preference):
    """Kahneman-Tversky optimization.

    The divergence of the policy from the reference is estimated in each batch, as in
    TRL, from prompts with the answers of other rows, and is not differentiated.
    """

    name: ClassVar[str] = "kto"
    unit: ClassVar[int | None] = 1
    what: ClassVar[str] = "rows"
    rows_per_unit: int = 1
    loss_types: ClassVar[tuple[str, ...]] = ("kto", "apo_zero_unpaired")
    uses: ClassVar[tuple[str, ...]] = ("desirable_weight", "undesirable_weight")
    metrics: tuple[str, ...] = (
        "rewards/chosen",
        "rewards/rejected",
        "logps/chosen",
        "logps/rejected",
        "kl",
    )

    _group: mx.distributed.Group | None = None

    def check(self, train: TrainConfig, dora: DoRAConfig) -> None:
        """Refuse batches of one row, and several losses."""
        super().check(train, dora)
        if len(self.loss_type) > 1:
            raise DoRAError(
                f"objective kto has one loss_type, got {', '.join(self.loss_type)}."
            )
        if self._estimates and train.batch_size < 2 and train.batch_tokens is None:
            raise DoRAError(
                "objective kto pairs the prompts of a batch with each other's answers: "
                f"batch_size must be at least 2, got {train.batch_size}."
            )
        if self.config.best_metric != "loss":
            raise DoRAError(
                "best_metric accuracy needs pairs; objective kto has only the loss."
            )

    @property
    def _estimates(self) -> bool:
        return self.loss_type[0] == "kto"

    def dataset(self, rows: Rows, tokenizer: Any) -> RowDataset:
        """Make the examples of a source: one of each answer."""
        return LabeledDataset(rows, tokenizer)

    def settings(self, data: Examples) -> dict[str, Any]:
        """Facts that must be unchanged when a run is resumed, with the labels."""
        label = data.label  # pyright: ignore[reportAttributeAccessIssue] - labeled
        text = "".join("01"[label(index)] for index in range(len(data)))
        labels = hashlib.sha256(text.encode()).hexdigest()
        return {**super().settings(data), "labels": f"sha256:{labels}"}

    def begin(self, around: Surroundings) -> None:
        """Keep the reference; of several processes, each estimates a part."""
        super().begin(around)
        self._group = around.group if around.group.size() > 1 else None

    def complete(self, model: nn.Module, data: Examples, batch: Batch) -> Batch:
        """Add the reference's log-probabilities, the labels and the divergence."""
        indices = [int(index) for index in np.array(batch[2])]
        tokens, marks, reference = super().complete(model, data, batch)
        label = data.label  # pyright: ignore[reportAttributeAccessIssue] - labeled
        labels = mx.array([index >= 0 and label(index) for index in indices])
        divergence = mx.array(0.0)
        if self._estimates:
            examples = [data[index] for index in indices if index >= 0]
            divergence = self._divergence(model, examples)
        return tokens, marks, reference, labels, divergence

    def _divergence(self, model: nn.Module, examples: list[Example]) -> mx.array:
        """Estimate the divergence from the reference, at least 0."""
        total, count = mx.array(0.0), mx.array(float(len(examples)))
        if examples:
            batch = pad_batch(mismatched(examples), self.max_seq_length)
            reference = reference_log_probs(
                self.reference, model, *batch, totals=self.row_totals
            )
            policy = row_log_probs(model, *batch, gradient=False).total
            total = (policy - reference).sum()
        # Only in training do all processes complete batches at the same time.
        if self._group is not None and model.training:
            total = mx.distributed.all_sum(total, group=self._group)
            count = mx.distributed.all_sum(count, group=self._group)
        divergence = mx.maximum(total / mx.maximum(count, 1), 0)
        mx.eval(divergence)
        return divergence

    def loss(self, model: nn.Module, *batch: mx.array) -> Outputs:
        """The mean loss of the rows, their number, tokens and metrics.

        Args:
            model: The model.
            *batch: Tokens, marks, the reference's log-probabilities, the labels and the
                divergence.
        """
        tokens, marks, reference, labels, divergence = batch
        found = row_log_probs(model, tokens, marks)
        ratios, real = found.total - reference, found.count > 0
        losses = kto_losses(
            ratios,
            labels,
            divergence,
            loss_type=self.loss_type[0],
            beta=self.beta,
            desirable_weight=self.config.desirable_weight,
            undesirable_weight=self.config.undesirable_weight,
        )
        count = real.sum()
        good, bad = real & labels, real & ~labels
        table = metric_table(
            (self.beta * ratios, good),
            (self.beta * ratios, bad),
            (found.total, good),
            (found.total, bad),
            (divergence, count),
        )
        mean = mx.where(real, losses, 0.0).sum() / mx.maximum(count, 1)
        return mean, count, found.count.sum(), table

    def derived(self, metrics: dict[str, float]) -> dict[str, float]:
        """Add the difference of the mean rewards."""
        names = ("rewards/chosen", "rewards/rejected")
        if not {*names} <= {*metrics}:
            return metrics
        chosen, rejected = (metrics[name] for name in names)
        return {**metrics, "rewards/margins": chosen - rejected}
