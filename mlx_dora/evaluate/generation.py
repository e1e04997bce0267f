"""A few continuations of a data set's own prompts, to read side by side."""

from dataclasses import dataclass
from typing import Any

import mlx.nn as nn

from mlx_dora.data.dataset import Dataset
from mlx_dora.errors import DoRAError
from mlx_dora.evaluate.loss import eval_mode

TEXT_PROMPT = 32
"""How many tokens of a plain text are shown to the model."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What a model is to continue.

    Args:
        tokens: What it sees.
        text: The same as text.
        expected: How the data goes on.
    """

    tokens: list[int]
    text: str
    expected: str


def sample_prompts(
    dataset: Dataset, tokenizer: Any, count: int, *, max_tokens: int = 1024
) -> list[Prompt]:
    """Prompts spread evenly over a data set, the same ones each time.

    A row without an answer (plain text) is cut after 32 tokens, or half way. Rows with
    longer prompts than `max_tokens`, or nothing after the cut, are passed over.

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
        model: A model of mlx-lm's, with or without an adapter.
        tokenizer: Its tokenizer.
        prompts: From `sample_prompts`.
        max_tokens: Stop after this many tokens.
    """
    from mlx_lm import generate

    with eval_mode(model):
        return [
            generate(model, tokenizer, prompt=one.tokens, max_tokens=max_tokens)
            for one in prompts
        ]
