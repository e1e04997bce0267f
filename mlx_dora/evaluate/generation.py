"""Sample continuations of prompts from a data set."""

from dataclasses import dataclass
from typing import Any

import mlx.nn as nn

from mlx_dora.data.dataset import Dataset
from mlx_dora.errors import DoRAError
from mlx_dora.evaluate.loss import eval_mode

TEXT_PROMPT = 32
"""Number of tokens of a plain text that form a prompt."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt for a model to continue.

    Args:
        tokens: Tokens of the prompt.
        text: Text of the prompt.
        expected: Continuation in the data.
    """

    tokens: list[int]
    text: str
    expected: str


def sample_prompts(
    dataset: Dataset, tokenizer: Any, count: int, *, max_tokens: int = 1024
) -> list[Prompt]:
    """Choose prompts evenly spread over a data set, the same on every call.

    A row without an answer (plain text) is cut after 32 tokens, or in half if shorter.
    Rows with an empty prompt or with one longer than `max_tokens` are skipped.

    Raises:
        DoRAError: If `count` is negative.
    """
    if count < 0:
        raise DoRAError(f"the number of samples must not be negative, got {count}.")
    prompts: list[Prompt] = []
    total = len(dataset)
    for place in range(min(count, total)):
        index = place * total // min(count, total)
        answer = dataset.answer(index)
        if answer is not None:
            tokens, expected = dataset.parts(index, answer).prompt, answer
        else:
            row, _ = dataset[index]
            cut = min(TEXT_PROMPT, len(row) // 2)
            tokens = row[:cut]
            end = cut + 64
            expected = tokenizer.decode(row[cut:end], skip_special_tokens=True)
        if 0 < len(tokens) <= max_tokens:
            text = tokenizer.decode(tokens)
            prompts.append(Prompt(tokens=tokens, text=text, expected=expected))
    return prompts


def generate_samples(
    model: nn.Module, tokenizer: Any, prompts: list[Prompt], *, max_tokens: int = 64
) -> list[str]:
    """Continue each prompt greedily with mlx-lm.

    Args:
        model: An mlx-lm model, with or without an adapter.
        tokenizer: Tokenizer of the model.
        prompts: Prompts from `sample_prompts`.
        max_tokens: Stop after this many tokens.
    """
    from mlx_lm import generate

    with eval_mode(model):
        return [
            generate(model, tokenizer, prompt=item.tokens, max_tokens=max_tokens)
            for item in prompts
        ]
