"""What the objectives of preferences share: pairs, the reference, and metrics."""

from collections.abc import Callable
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn

from mlx_dora.adapters.config import DoRAConfig
from mlx_dora.adapters.files import read_adapter
from mlx_dora.data.batches import Batch, Examples
from mlx_dora.data.cut import KeptEnds
from mlx_dora.data.dataset import RowDataset
from mlx_dora.data.preferences import PairDataset
from mlx_dora.data.rows import Rows
from mlx_dora.errors import DoRAError
from mlx_dora.evaluate.log_probabilities import LogProbs, row_log_probs
from mlx_dora.options import names_with
from mlx_dora.train.config import TrainConfig
from mlx_dora.train.objectives.config import PreferenceConfig
from mlx_dora.train.objectives.objective import (
    Measured,
    Objective,
    Surroundings,
    metric_table,
)
from mlx_dora.train.objectives.reference import (
    EarlierAdapter,
    Reference,
    StartingWeights,
)
from mlx_dora.train.objectives.reference_table import ReferenceTable

ACCURACY = "rewards/accuracies"
PAIR_METRICS = (
    "rewards/chosen",
    "rewards/rejected",
    ACCURACY,
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)


class Preference(Objective):
    """An objective on pairs of a chosen and a rejected answer.

    Args:
        config: Settings of the objective.
        max_seq_length: Number of tokens to which rows are cut.
    """

    unit: ClassVar[int | None] = 2
    what: ClassVar[str] = "pairs"
    rows_per_unit: int = 2
    metrics: tuple[str, ...] = PAIR_METRICS
    default_beta: ClassVar[float] = 0.1
    """TRL's default."""
    loss_types: ClassVar[tuple[str, ...]] = ()
    """The loss types that are known; the first is the default."""
    uses: ClassVar[tuple[str, ...]] = ()
    """Settings that the objective reads beside those of every one."""
    has_reference: ClassVar[bool] = True

    def __init__(self, config: PreferenceConfig, max_seq_length: int = 2048) -> None:
        self.config = config
        self.max_seq_length = max_seq_length
        self.beta = self.default_beta if config.beta is None else config.beta
        self.loss_type = config.loss_type or self.loss_types[:1]
        self._reference: Reference | None = None
        self._table: ReferenceTable | None = None

    def check(self, train: TrainConfig, dora: DoRAConfig) -> None:
        """Refuse settings that the objective does not read, or that do not fit."""
        known = ("beta", "truncation_mode", "best_metric", *self.uses)
        if self.has_reference:
            known += ("precompute_reference", "reference_adapter")
        if len(self.loss_types) > 1:
            known += ("loss_type",)
        default = PreferenceConfig()
        for name in names_with(PreferenceConfig, "special", ()):
            given = getattr(self.config, name)
            if name not in known and given != getattr(default, name):
                if name == "loss_type" and given == self.loss_types:
                    continue
                raise DoRAError(
                    f"{name} does not apply to objective {self.name}: leave it out."
                )
        for name in self.loss_type:
            if self.loss_types and name not in self.loss_types:
                raise DoRAError(
                    f"loss_type of objective {self.name} must be "
                    f"{' or '.join(self.loss_types)}, got {name!r}."
                )
        if train.packing:
            raise DoRAError(
                f"packing joins rows of text, which objective {self.name} compares one "
                "by one: leave it out (batch_tokens fills batches too)."
            )
        if dora.variant == "bidora":
            raise DoRAError(
                "variant bidora splits single rows between its two levels: it does not "
                f"go with objective {self.name}."
            )
        for name in ("mask_prompt", "all_turns"):
            if getattr(train, name):
                raise DoRAError(
                    f"{name} is for objective sft: {self.name} always counts the "
                    "answer alone."
                )

    def dataset(self, rows: Rows, tokenizer: Any) -> RowDataset:
        """Make the examples of a source: the chosen and the rejected answer of each."""
        return PairDataset(rows, tokenizer)

    def limited(self, data: RowDataset, max_seq_length: int) -> RowDataset:
        """The data, with the starts of long rows cut if `truncation_mode` says so."""
        if self.config.truncation_mode == "keep_start":
            return data
        return KeptEnds(data, max_seq_length)

    def adapting(self, model: nn.Module) -> None:
        """Read the adapter that is the reference, if one is named."""
        if self.config.reference_adapter is not None:
            self._reference = EarlierAdapter(model, self.config.reference_adapter)

    def begin(self, around: Surroundings) -> None:
        """Keep the reference, and compute its log-probabilities if that is asked."""
        if not self.has_reference:
            return
        if around.train.fine_tune_type == "full" and self._reference is None:
            self._reference = StartingWeights(around.model)
        if self.config.precompute_reference:
            self._table = ReferenceTable.made(around, self.reference)

    @property
    def reference(self) -> Reference:
        """The reference policy."""
        return self._reference or Reference()

    def settings(self, data: Examples) -> dict[str, Any]:
        """Facts that must be unchanged when a run is resumed."""
        names = names_with(PreferenceConfig, "may_change", False)
        values = {f"preference.{n}": getattr(self.config, n) for n in names}
        if self.has_reference:
            values["reference"] = self.reference.identity
        return {"objective": self.name, **values, **self._resolved()}

    def summary(self) -> dict[str, Any]:
        """Facts that the adapter records about its training."""
        names = (*self.uses, "truncation_mode")
        own = {name: getattr(self.config, name) for name in names}
        return {"objective": self.name, **own, **self._resolved()}

    def _resolved(self) -> dict[str, Any]:
        return {"beta": self.beta, "loss_type": list(self.loss_type)}

    def held_bytes(self, train: TrainConfig, trained: int) -> int:
        """Bytes of the reference beside the model."""
        if not self.has_reference:
            return 0
        if path := self.config.reference_adapter:
            return sum(value.nbytes for value in read_adapter(path).tensors.values())
        return trained if train.fine_tune_type == "full" else 0

    def complete(self, model: nn.Module, data: Examples, batch: Batch) -> Batch:
        """Add the reference's log-probability of each row, float32 ``(rows,)``."""
        tokens, marks, indices = batch
        if not self.has_reference:
            return tokens, marks
        if self._table is not None and self._table.has(data):
            return tokens, marks, self._table.look_up(data, indices)
        found = reference_log_probs(
            self.reference, model, tokens, marks, totals=self.row_totals
        )
        return tokens, marks, found

    def row_totals(self, found: LogProbs) -> mx.array:
        """The log-probability of each answer. Float32 ``(rows,)``."""
        return found.total

    def score(self, measured: Measured) -> float:
        """The loss; or the number of wrong preferences plus a fraction for the loss."""
        if self.config.best_metric == "loss":
            return measured.loss
        wrong = round((1 - measured.metrics[ACCURACY]) * measured.count)
        return wrong + (1 + measured.loss / (1 + abs(measured.loss))) / 2


def split_pairs(values: mx.array) -> tuple[mx.array, mx.array]:
    """The chosen and the rejected rows of a batch of pairs."""
    pairs = values.shape[0] // 2
    return values[:pairs], values[pairs:]


def pair_table(
    chosen_rewards: mx.array,
    rejected_rewards: mx.array,
    chosen: mx.array,
    rejected: mx.array,
    real: mx.array,
) -> mx.array:
    """The table of `PAIR_METRICS`; all arguments have the shape ``(pairs,)``.

    Args:
        chosen_rewards: Rewards of the chosen answers.
        rejected_rewards: Rewards of the rejected answers.
        chosen: Log-probabilities of the chosen answers.
        rejected: Log-probabilities of the rejected answers.
        real: Which pairs are not there to fill up the batch.
    """
    return metric_table(
        (chosen_rewards, real),
        (rejected_rewards, real),
        (chosen_rewards > rejected_rewards, real),
        (chosen_rewards - rejected_rewards, real),
        (chosen, real),
        (rejected, real),
    )


def reference_log_probs(
    reference: Reference,
    model: nn.Module,
    tokens: mx.array,
    marks: mx.array,
    *,
    totals: Callable[[LogProbs], mx.array],
) -> mx.array:
    """The reference's log-probability of each row, evaluated. Float32 ``(rows,)``."""
    with reference.standing_in(model):
        total = totals(row_log_probs(model, tokens, marks, gradient=False))
        mx.eval(total)
    return total
