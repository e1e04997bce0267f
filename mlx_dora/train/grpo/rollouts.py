"""Completions for updates and validations, judged and logged, on all processes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_dora.data.targets import Example
from mlx_dora.train.group import share, together
from mlx_dora.train.grpo.advantages import Advantages, advantages, total_rewards
from mlx_dora.train.grpo.config import RewardConfig
from mlx_dora.train.grpo.generation import Generation, Generator
from mlx_dora.train.grpo.samples import sample_rows
from mlx_dora.train.rewards import Reward
from mlx_dora.train.run.lines import Lines

_VALIDATION = 2**63
"""In place of the step, in the seeds of validations."""
_LENGTH = "completions/mean_length"
AFTER_LOSS = ("clip_ratio", "kl")
"""The last metrics, which the loss adds; ``kl`` only with a reference."""


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """The completions of a batch of prompts, of this process.

    Args:
        examples: Prompt and completion as tokens, with the completion's start.
        advantages: Advantage of each. Float64, shape ``(completions,)``.
        table: Sum and weight of each metric known before the loss, ``(metrics, 2)``.
    """

    examples: list[Example]
    advantages: np.ndarray
    table: np.ndarray


class Rollouts:
    """Samples and judges completions, and logs them.

    Args:
        config: Settings of the objective.
        rewards: The reward functions.
        group: The processes that share each batch.

    Attributes:
        metrics: Names of the metrics, in the order of the tables.
        log: The log of samples; it writes nothing until it is replaced.
        step: Number of batches of prompts that were used, for seeds and log.
    """

    def __init__(
        self,
        config: RewardConfig,
        rewards: Sequence[Reward],
        group: mx.distributed.Group,
    ) -> None:
        self._config, self._rewards, self._group = config, rewards, group
        self.metrics = (
            "reward",
            *(f"rewards/{reward.name}" for reward in rewards),
            "reward_std",
            "frac_reward_zero_std",
            _LENGTH,
            "completions/clipped_ratio",
            *AFTER_LOSS[: 2 if config.beta else 1],
        )
        self.log = Lines(None)
        self.step = 0

    def of_update(
        self,
        generator: Generator,
        data: Any,
        batches: Sequence[Sequence[int]],
        seed: int,
    ) -> list[Rollout]:
        """Sample completions for the batches of an update.

        Rewards are compared with those of all processes where the settings ask for it.

        Args:
            generator: Samples from the model.
            data: The prompts.
            batches: Indices of the prompts of each batch, of this process.
            seed: Seed of the run.

        Raises:
            DoRAError: If a reward fails, in every process.
        """
        group, count = self._group, self._config.num_generations
        numbers = (seed, self.step, group.rank())
        with together(group):
            made = generator.generate(
                data, [index for batch in batches for index in batch], numbers, count
            )
        tables = self._of_all(made.rewards.tolist())
        judged = advantages(np.array([r for t in tables for r in t]), self._config)
        start = sum(len(table) for table in tables[: group.rank()])
        here = slice(start, start + len(made.completions))
        gains, totals = judged.advantage[here], judged.reward[here]
        self._write(self._rows(made, totals, gains, "train"))
        rollouts, at = [], 0
        for place, batch in enumerate(batches):
            rows = slice(at, at + count * len(batch))
            is_first = place == 0 and group.rank() == 0
            table = self._table(made, rows, totals, judged if is_first else None)
            rollouts.append(
                Rollout(
                    examples=made.examples(
                        rows, leave_out_cut=self._config.mask_truncated_completions
                    ),
                    advantages=gains[rows],
                    table=table,
                )
            )
            at = rows.stop
        return rollouts

    def of_validation(
        self,
        generator: Generator,
        data: Any,
        batches: Sequence[Sequence[int]],
        seed: int,
        progress: Callable[[int], None] | None,
    ) -> np.ndarray:
        """Sample completions of validation prompts, with the same seeds every time.

        Args:
            generator: Samples from the model.
            data: The prompts.
            batches: Indices of the prompts of each batch, of all processes.
            seed: Seed of the run.
            progress: Called after each batch with its number of prompts.

        Returns:
            Sum and weight of each metric over all processes, ``(metrics, 2)``.
        """
        group = self._group
        count = self._config.num_generations_eval or self._config.num_generations
        rows, table = [], np.zeros((len(self.metrics), 2))
        with together(group):
            for number, batch in enumerate(batches):
                if number % group.size() == group.rank():
                    numbers = (seed, _VALIDATION, number)
                    made = generator.generate(data, batch, numbers, count)
                    totals = total_rewards(made.rewards, self._config)
                    table = table + self._table(made, slice(None), totals)
                    rows += self._rows(made, totals, None, "valid")
                if progress is not None:
                    progress(len(batch))
        self._write(rows)
        return np.array(self._of_all(table.tolist())).sum(axis=0)

    def length_of(self, table: np.ndarray) -> int:
        """Number of tokens of the completions of a table."""
        return round(table[self.metrics.index(_LENGTH), 0])

    def _of_all(self, value: Any) -> list[Any]:
        """A JSON value of every process."""
        group = self._group
        return [share(value, group, source=rank) for rank in range(group.size())]

    def _write(self, rows: list[dict[str, Any]]) -> None:
        everyone = [row for part in self._of_all(rows) for row in part]
        with together(self._group):
            self.log.append(everyone)

    def _rows(
        self, made: Generation, totals: np.ndarray, gains: np.ndarray | None, of: str
    ) -> list[dict[str, Any]]:
        facts = {"step": self.step, "set": of}
        return sample_rows(made, self._rewards, totals, gains, facts)

    def _table(
        self,
        made: Generation,
        rows: slice,
        totals: np.ndarray,
        judged: Advantages | None = None,
    ) -> np.ndarray:
        """Sums and weights of some completions.

        `judged` holds what is reported once for all batches sampled together. A metric
        that is not known here has weight 0.
        """
        table = np.zeros((len(self.metrics), 2))
        columns = [totals[rows], *made.rewards[rows].T]
        for place, values in enumerate(columns):
            table[place] = np.nansum(values), (~np.isnan(values)).sum()
        if judged is not None:
            at = len(columns)
            table[at : at + 2] = [(judged.deviation, 1), (judged.flat_groups, 1)]
        completions = made.completions[rows]
        count = len(completions)
        cut = sum(not one.is_stopped for one in completions)
        at = self.metrics.index(_LENGTH)
        table[at] = sum(len(one.tokens) for one in completions), count
        table[at + 1] = cut, count
        return table
