"""GRPO: group relative policy optimization (arXiv:2402.03300)."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_dora.adapters.config import DoRAConfig
from mlx_dora.adapters.files import read_adapter
from mlx_dora.data.batches import EMPTY, Batch, pad_batch, padded_width
from mlx_dora.data.dataset import RowDataset
from mlx_dora.data.prompts import PromptDataset, digest_columns
from mlx_dora.data.rows import Rows
from mlx_dora.errors import DoRAError
from mlx_dora.evaluate.log_probabilities import row_log_probs
from mlx_dora.evaluate.loss import eval_mode
from mlx_dora.options import names_with
from mlx_dora.train.config import TrainConfig
from mlx_dora.train.grpo.config import RewardConfig
from mlx_dora.train.grpo.generation import Generator
from mlx_dora.train.grpo.loss import policy_loss
from mlx_dora.train.grpo.rollouts import Rollout, Rollouts
from mlx_dora.train.grpo.samples import SAMPLES_NAME
from mlx_dora.train.objectives.objective import (
    Measured,
    Objective,
    Outputs,
    Surroundings,
    metric_table,
)
from mlx_dora.train.objectives.reference import (
    EarlierAdapter,
    Reference,
    StartingWeights,
)
from mlx_dora.train.rewards import check_columns, load_rewards
from mlx_dora.train.run.lines import Lines


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
        self._rollouts = Rollouts(config, self.rewards, mx.distributed.init())
        self.metrics = self._rollouts.metrics
        self.rows_per_unit = config.num_generations
        self.added_tokens = config.max_completion_length - 1
        self.passes = config.num_iterations
        self._tokenizer: Any = None
        self._samples: Path | None = None
        self._reference = Reference()
        self._used = 0
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
        if self.config.reference_adapter is not None and not self.config.beta:
            raise DoRAError(
                "reference_adapter needs beta above 0: without the KL divergence there "
                "is no reference."
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
            if (length := len(data[index][0]) - 1) > room:
                raise DoRAError(
                    f"{data.where(index)}: the prompt has {length} tokens, but "
                    f"max_seq_length {max_seq_length} less max_completion_length "
                    f"{self.config.max_completion_length} leaves {room}: raise "
                    "max_seq_length, or remove the row."
                )
        return data

    # Before the first step.

    def adapting(self, model: nn.Module) -> None:
        """Read the adapter that is the reference, if one is named."""
        if self.config.reference_adapter is not None:
            path = self.config.reference_adapter
            self._reference = EarlierAdapter(model, path)

    def begin(self, around: Surroundings) -> None:
        """Prepare to sample, and keep the reference if there is one."""
        self._seed = around.train.seed
        self._tokenizer = around.tokenizer
        self._length = around.train.max_seq_length
        is_full = around.train.fine_tune_type == "full"
        if self.config.beta and is_full and self.config.reference_adapter is None:
            self._reference = StartingWeights(around.model)
        if around.group.rank() == 0:  # the others may have no such folder
            self._samples = around.folder / SAMPLES_NAME
            self._rollouts.log = Lines(self._samples)

    def settings(self, data: Any) -> dict[str, Any]:
        """Facts that must be unchanged when a run is resumed."""
        values = {f"reward.{name}": v for name, v in asdict(self.config).items()}
        values["reward data"] = digest_columns(data)
        values["reference"] = self._reference.identity
        # As a checkpoint reads them: tuples as lists.
        return json.loads(json.dumps({"objective": self.name, **values}))

    def summary(self) -> dict[str, Any]:
        """Facts that the adapter records about its training."""
        names = names_with(RewardConfig, "recorded")
        own = {name: getattr(self.config, name) for name in names}
        weights = dict(zip(self.config.reward_funcs, self.config.weights, strict=True))
        return {"objective": self.name, "rewards": weights, **own}

    def held_bytes(self, train: TrainConfig, trained: int) -> int:
        """Bytes of the reference beside the model: in full training, the weights."""
        if path := self.config.reference_adapter:
            return sum(value.nbytes for value in read_adapter(path).tensors.values())
        return trained if self.config.beta and train.fine_tune_type == "full" else 0

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: the place in the log of samples."""
        rollouts = self._rollouts
        return {"step": rollouts.step, "samples_bytes": rollouts.log.position()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from the state of a checkpoint, and cut the log of samples."""
        if not {"step", "samples_bytes"} <= {*state}:
            raise DoRAError(
                "the checkpoint to resume from belongs to another objective: start "
                "over with --overwrite."
            )
        self._rollouts.step = state["step"]
        if self._samples is not None:
            self._rollouts.log.restore(self._samples, state["samples_bytes"])

    def step_shapes(self, shape: tuple[int, ...]) -> Iterable[tuple[int, ...]]:
        """Shapes of the completions of a batch of prompts, from shortest to longest."""
        prompts, width = shape
        lengths = range(width, width + self.added_tokens + 1)
        widths = {padded_width(length, self._length) for length in lengths}
        return [(prompts * self.rows_per_unit, width) for width in sorted(widths)]

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
        self._rollouts.step += len(window)
        return self._window[: len(window)]  # fewer where the run ends

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
        """Completed batches of new completions, evaluated."""
        listed: list[Any] = [batch[2].tolist() for batch in window]
        indices = [[index for index in batch if index >= 0] for batch in listed]
        rollouts = self._rollouts.of_update(
            self._generator(model), data, indices, self._seed
        )
        return [self._batch(model, rollout) for rollout in rollouts]

    def _batch(self, model: nn.Module, rollout: Rollout) -> Batch:
        # A process that has no prompt of a small batch gets a row without a target.
        gains = rollout.advantages if rollout.examples else np.zeros(1)
        tokens, marks = pad_batch(rollout.examples or [EMPTY], self._length)
        table = mx.array(rollout.table.astype(np.float32))
        batch = [tokens, marks, mx.array(gains.astype(np.float32)), table]
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
        size, wanted = train.batch_size, len(data)
        if num_batches != -1:
            wanted = min(wanted, num_batches * size)
        chosen = [place * len(data) // wanted for place in range(wanted)]
        batches = [chosen[at : at + size] for at in range(0, wanted, size)]
        table = self._rollouts.of_validation(
            self._generator(model), data, batches, train.seed, progress
        )
        reward, scored = table[0]
        return Measured(
            loss=-reward / max(scored, 1),
            count=round(scored),
            tokens=self._rollouts.length_of(table),
            rows=wanted,
            metrics=self.values(table.flatten().tolist()),
        )

    def _generator(self, model: nn.Module) -> Generator:
        return Generator(model, self._tokenizer, self.rewards, self.config)
