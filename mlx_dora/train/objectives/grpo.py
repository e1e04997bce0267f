"""GRPO: group relative policy optimization (arXiv:2402.03300)."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_dora.adapters.config import DoRAConfig
from mlx_dora.data.batches import EMPTY, Batch, Examples, pad_batch
from mlx_dora.data.dataset import RowDataset
from mlx_dora.data.prompts import PromptDataset, digest_columns
from mlx_dora.data.rows import Rows
from mlx_dora.errors import DoRAError
from mlx_dora.evaluate.log_probabilities import row_log_probs
from mlx_dora.evaluate.loss import eval_mode
from mlx_dora.options import names_with
from mlx_dora.train.config import TrainConfig
from mlx_dora.train.group import share, together
from mlx_dora.train.grpo.advantages import Advantages, advantages, total_rewards
from mlx_dora.train.grpo.config import RewardConfig
from mlx_dora.train.grpo.generation import Generation, Generator
from mlx_dora.train.grpo.loss import policy_loss
from mlx_dora.train.grpo.samples import SAMPLES_NAME, sample_rows
from mlx_dora.train.objectives.objective import (
    Measured,
    Objective,
    Outputs,
    Surroundings,
    metric_table,
)
from mlx_dora.train.objectives.reference import Reference, StartingWeights
from mlx_dora.train.rewards import check_columns, load_rewards
from mlx_dora.train.run.lines import Lines


_VALIDATION = 2**63
"""In place of the step, in the seeds of validations."""
_LENGTH = "completions/mean_length"


class Grpo(Objective):
    """Group relative policy optimization: learns from rewards of sampled completions.

    Before an update, ``num_generations`` completions of each prompt of its batches are
    sampled from the model as it is, and judged; a completion is reinforced as far as
    its reward exceeds that of the prompt's other completions.

    Args:
        config: Settings of the objective.
    """

    name: ClassVar[str] = "grpo"
    unit: ClassVar[int | None] = 1
    what: ClassVar[str] = "completions"

    def __init__(self, config: RewardConfig) -> None:
        self.config = config
        self.rewards = load_rewards(config)
        self.metrics = (
            "reward",
            *(f"rewards/{reward.name}" for reward in self.rewards),
            "reward_std",
            "frac_reward_zero_std",
            _LENGTH,
            "completions/clipped_ratio",
            "clip_ratio",
            *("kl",) * bool(config.beta),
        )
        self.rows_per_unit = config.num_generations
        self.passes = config.num_iterations
        self._group = mx.distributed.init()
        self._tokenizer: Any = None
        self._digests: list[str] = []
        self._log = Lines(None)
        self._reference = Reference()
        self._step = self._used = 0
        self._window: list[Batch] = []

    # Before the model is loaded.

    def check(self, train: TrainConfig, dora: DoRAConfig) -> None:
        """Refuse settings that do not go together."""
        for name in ("packing", "batch_tokens", "mask_prompt", "all_turns"):
            if getattr(train, name):
                raise DoRAError(
                    f"{name} does not apply to objective grpo, whose completions are "
                    "sampled: leave it out."
                )
        if dora.variant == "bidora":
            raise DoRAError(
                "variant bidora splits the rows between its two levels: it does not go "
                "with objective grpo."
            )
        room = train.max_seq_length - self.config.max_completion_length
        if room < 1:
            raise DoRAError(
                f"max_completion_length {self.config.max_completion_length} leaves no "
                f"room for a prompt in max_seq_length {train.max_seq_length}: raise "
                "max_seq_length, or lower max_completion_length."
            )
        if self.passes > 1:
            # A checkpoint in between would need the policy that sampled.
            block = train.grad_accumulation_steps * self.passes
            if train.save_every % block:
                raise DoRAError(
                    f"save_every must be a multiple of grad_accumulation_steps times "
                    f"num_iterations, {block}, got {train.save_every}: checkpoints lie "
                    "between samplings."
                )
            if train.epochs_per_eval:
                raise DoRAError(
                    "epochs_per_eval does not go with num_iterations: set "
                    "steps_per_eval."
                )

    def dataset(self, rows: Rows, tokenizer: Any) -> RowDataset:
        """Make the prompts of a source, whose columns the rewards must know."""
        self._tokenizer = tokenizer
        data = PromptDataset(rows, tokenizer)
        check_columns(self.rewards, data.prompt(0).columns)
        return data

    def limited(self, data: RowDataset, max_seq_length: int) -> RowDataset:
        """Refuse prompts that leave no room for a completion."""
        room = max_seq_length - self.config.max_completion_length
        for index in range(len(data)):
            if (length := len(data[index][0])) > room:
                raise DoRAError(
                    f"{data.where(index)}: the prompt has {length} tokens, but "
                    f"max_seq_length {max_seq_length} less max_completion_length "
                    f"{self.config.max_completion_length} leaves {room}: raise "
                    "max_seq_length, or remove the row."
                )
        self._digests.append(digest_columns(data))
        return data

    # Before the first step.

    def begin(self, around: Surroundings) -> None:
        """Prepare to sample, and keep the reference if there is one."""
        self._seed = around.train.seed
        self._tokenizer = around.tokenizer
        self._length = around.train.max_seq_length
        if self.config.beta and around.train.fine_tune_type == "full":
            self._reference = StartingWeights(around.model)
        is_writer = around.group.rank() == 0
        self._log = Lines(around.folder / SAMPLES_NAME if is_writer else None)
        self._place = around.folder / SAMPLES_NAME

    def settings(self) -> dict[str, Any]:
        """Facts that must be unchanged when a run is resumed."""
        values = {f"reward.{name}": v for name, v in asdict(self.config).items()}
        values["reward data"] = self._digests[0]  # that of the training set
        # As a checkpoint reads them: tuples as lists.
        return json.loads(json.dumps({"objective": self.name, **values}))

    def summary(self) -> dict[str, Any]:
        """Facts that the adapter records about its training."""
        names = names_with(RewardConfig, "recorded")
        own = {name: getattr(self.config, name) for name in names}
        weights = dict(zip(self.config.reward_funcs, self.config.weights, strict=True))
        return {"objective": self.name, "rewards": weights, **own}

    def held_bytes(self, trained: int) -> int:
        """Bytes of the reference beside the model."""
        return self._reference.held_bytes(trained) if self.config.beta else 0

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: the place in the log of samples."""
        return {"step": self._step, "samples_bytes": self._log.position()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from the state of a checkpoint, and cut the log of samples."""
        self._step = state["step"]
        self._log.restore(self._place, state["samples_bytes"])

    # Each step.

    def completed(
        self, model: nn.Module, data: Any, window: Sequence[Batch]
    ) -> Iterable[Batch]:
        """Sample the completions of an update, or reuse those of the update before.

        Args:
            model: The model.
            data: The prompts.
            window: Batches of prompts, with the indices of the prompts.

        Returns:
            Batches of completions: tokens and marks, advantages ``(rows,)``, a table of
            metrics, and log-probabilities ``(rows, length - 1)`` of the policy that
            sampled (with ``num_iterations`` > 1) and of the reference (with ``beta``).
        """
        if self._used % self.passes == 0:
            self._window = self._sampled(model, data, window)
        self._used += 1
        self._step += len(window)
        return self._window

    def loss(self, model: nn.Module, *batch: mx.array) -> Outputs:
        """The loss of a batch of completions, its count, tokens and metrics."""
        tokens, marks, gains, facts, *more = batch
        found = row_log_probs(model, tokens, marks, temperature=self.config.temperature)
        old = more.pop(0) if self.passes > 1 else None
        reference = more.pop(0) if self.config.beta else None
        result = policy_loss(
            found.each, gains, found.mask, self.config, old=old, reference=reference
        )
        size = found.count.sum()
        shares = [result.clipped] if result.kl is None else [result.clipped, result.kl]
        table = metric_table(*((share[None], size[None]) for share in shares))
        table = mx.concatenate([facts[: -len(shares)], table])
        return result.value, result.count, size, table

    def _sampled(
        self, model: nn.Module, data: Any, window: Sequence[Batch]
    ) -> list[Batch]:
        group, count = self._group, self.config.num_generations
        own = [[i for i in batch[2].tolist() if i >= 0] for batch in window]
        seed = (self._seed, self._step, group.rank())
        with together(group):
            made = self._generator(model).generate(
                data, [index for indices in own for index in indices], seed, count
            )
        # Rewards are compared with those of all processes.
        tables = self._of_all(made.rewards.tolist())
        judged = advantages(np.array([r for t in tables for r in t]), self.config)
        start = sum(len(table) for table in tables[: group.rank()])
        here = slice(start, start + len(made.completions))
        gains, totals = judged.advantage[here], judged.reward[here]
        self._write(self._rows(made, totals, gains, "train"))
        batches, at = [], 0
        for place, indices in enumerate(own):
            rows = slice(at, at + count * len(indices))
            is_first = place == 0 and group.rank() == 0
            table = self._facts(made, rows, totals, judged if is_first else None)
            batches.append(self._batch(model, made, rows, gains, table))
            at = rows.stop
        return batches

    def _batch(
        self,
        model: nn.Module,
        made: Generation,
        rows: slice,
        gains: np.ndarray,
        table: np.ndarray,
    ) -> Batch:
        """A batch of completions with all that the loss takes, evaluated."""
        examples = []
        for prompt, one in zip(made.prompts[rows], made.completions[rows], strict=True):
            tokens = prompt + one.tokens
            is_left_out = self.config.mask_truncated_completions and not one.is_stopped
            examples.append((tokens, len(tokens) if is_left_out else len(prompt)))
        own = gains[rows] if examples else np.zeros(1)
        tokens, marks = pad_batch(examples or [EMPTY], self._length)
        batch = [tokens, marks, mx.array(own.astype(np.float32)), mx.array(table)]
        if self.passes > 1:
            batch.append(self._log_probs(model, tokens, marks))
        if self.config.beta:
            with self._reference.standing_in(model):
                batch.append(self._log_probs(model, tokens, marks))
        mx.eval(batch)
        return tuple(batch)

    def _log_probs(
        self, model: nn.Module, tokens: mx.array, marks: mx.array
    ) -> mx.array:
        """Log-probability of each token without dropout. ``(rows, length - 1)``."""
        with eval_mode(model):
            found = row_log_probs(
                model,
                tokens,
                marks,
                gradient=False,
                temperature=self.config.temperature,
            )
            mx.eval(found.each)
        return found.each

    # At validations.

    def measure(
        self,
        model: nn.Module,
        data: Any,
        *,
        train: TrainConfig,
        num_batches: int,
        progress: Callable[[int], None] | None,
        group: mx.distributed.Group | None,
    ) -> Measured:
        """Mean reward of completions of prompts spread evenly over the data.

        Every validation draws the same random numbers, so that two differ by the model
        alone. The loss is minus the mean reward.
        """
        group = mx.distributed.init() if group is None else group
        count = self.config.num_generations_eval or self.config.num_generations
        wanted = len(data)
        if num_batches != -1:
            wanted = min(wanted, num_batches * train.batch_size)
        chosen = [place * len(data) // wanted for place in range(wanted)]
        rows, table = [], np.zeros((len(self.metrics), 2))
        with together(group):
            for number, at in enumerate(range(0, wanted, train.batch_size)):
                indices = chosen[at : at + train.batch_size]
                if number % group.size() == group.rank():
                    seed = (train.seed, _VALIDATION, number)
                    made = self._generator(model).generate(data, indices, seed, count)
                    totals = total_rewards(made.rewards, self.config)
                    every = slice(0, len(totals))
                    table = table + self._facts(made, every, totals)
                    rows += self._rows(made, totals, None, "valid")
                if progress is not None:
                    progress(len(indices))
        table = np.array(self._of_all(table.tolist())).sum(axis=0)
        self._write(rows)
        reward, scored = table[0]
        return Measured(
            loss=-reward / max(scored, 1),
            count=round(scored),
            tokens=round(table[self.metrics.index(_LENGTH), 0]),
            rows=wanted,
            metrics=self.values(table.flatten().tolist()),
        )

    # For all.

    def _generator(self, model: nn.Module) -> Generator:
        return Generator(model, self._tokenizer, self.rewards, self.config)

    def _of_all(self, value: Any) -> list[Any]:
        """A JSON value of every process."""
        group = self._group
        return [share(value, group, source=rank) for rank in range(group.size())]

    def _write(self, rows: list[dict[str, Any]]) -> None:
        """Log the samples of all processes."""
        everyone = [row for part in self._of_all(rows) for row in part]
        with together(self._group):
            self._log.append(everyone)

    def _rows(
        self,
        made: Generation,
        totals: np.ndarray,
        gains: np.ndarray | None,
        of: str,
    ) -> list[dict[str, Any]]:
        facts = {"step": self._step, "set": of}
        return sample_rows(made, self.rewards, totals, gains, facts)

    def _facts(
        self,
        made: Generation,
        rows: slice,
        totals: np.ndarray,
        judged: Advantages | None = None,
    ) -> np.ndarray:
        """Sum and weight of each metric that is known before the loss.

        Args:
            made: The completions.
            rows: Those that count.
            totals: Reward of every completion.
            judged: What is reported once for all batches sampled together, or None.

        Returns:
            Shape ``(metrics, 2)``; weight 0 where a metric is not known here.
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
