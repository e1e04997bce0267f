"""Completions of a batch's prompts with their rewards, on one process."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.nn as nn
import numpy as np

from mlx_dora.data.prompts import Prompt
from mlx_dora.data.targets import Example
from mlx_dora.train.grpo.config import RewardConfig
from mlx_dora.train.grpo.sampling import Completion, row_seeds, sample_completions
from mlx_dora.train.rewards import Reward, score


@dataclass(frozen=True, kw_only=True)
class Generation:
    """Completions of some prompts; those of a prompt are consecutive.

    Args:
        prompts: Tokens of the prompt of each completion.
        completions: The completions.
        texts: Their texts, without end tokens.
        shown: The prompt of each completion as text.
        rewards: Reward of each function, NaN if it gave none. Float64, shape
            ``(completions, functions)``.
    """

    prompts: list[list[int]]
    completions: list[Completion]
    texts: list[str]
    shown: list[str]
    rewards: np.ndarray

    def examples(self, rows: slice, *, leave_out_cut: bool) -> list[Example]:
        """Prompt and completion of some rows, with the completion as the target.

        Args:
            rows: The rows.
            leave_out_cut: Whether a completion that was cut is no target.
        """
        examples = []
        for prompt, one in zip(self.prompts[rows], self.completions[rows], strict=True):
            tokens = prompt + one.tokens
            is_left_out = leave_out_cut and not one.is_stopped
            examples.append((tokens, len(tokens) if is_left_out else len(prompt)))
        return examples


class Generator:
    """Samples completions of prompts and judges them.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        rewards: The reward functions.
        config: The settings.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        rewards: Sequence[Reward],
        config: RewardConfig,
    ) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._rewards, self._config = rewards, config

    def generate(
        self, data: Any, indices: Sequence[int], seed: Sequence[int], count: int
    ) -> Generation:
        """Sample and judge `count` completions of each prompt.

        Args:
            data: The prompts, a `PromptDataset` or several joined.
            indices: Which of them.
            seed: Numbers that the random numbers depend on, beside the prompt's place
                among `indices`.
            count: Completions per prompt.

        Raises:
            DoRAError: If a reward fails; names the reward and the prompt.
        """
        prompts = [data[index][0][:-1] for index in indices]
        seeds = [row_seeds([*seed, at], count) for at in range(len(prompts))]
        groups = sample_completions(
            self._model, self._tokenizer, prompts, seeds, self._config
        )
        completions = [one for group in groups for one in group]
        places = [at for at in range(len(prompts)) for _ in range(count)]
        texts = [self._text(one.tokens) for one in completions]
        facts = [data.prompt(indices[at]) for at in places]
        return Generation(
            prompts=[prompts[at] for at in places],
            completions=completions,
            texts=texts,
            shown=[self._tokenizer.decode(prompts[at]) for at in places],
            rewards=self._judge(facts, texts, completions),
        )

    def _judge(
        self,
        prompts: Sequence[Prompt],
        texts: Sequence[str],
        completions: Sequence[Completion],
    ) -> np.ndarray:
        if not prompts:
            return np.zeros((0, len(self._rewards)))
        answers = [
            [{"role": "assistant", "content": text}] if prompt.is_chat else text
            for prompt, text in zip(prompts, texts, strict=True)
        ]
        return score(
            self._rewards,
            [prompt.value for prompt in prompts],
            answers,
            [one.tokens for one in completions],
            {
                name: [prompt.columns[name] for prompt in prompts]
                for name in prompts[0].columns
            },
        )

    def _text(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True)
