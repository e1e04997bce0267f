"""Samples groups of completions with mlx-lm's batch generator.

The completions come from the model as it is, with its adapter in eval mode: norms and
gains are computed once for all of them. Each completion has random numbers of its own,
so that a resumed training samples the same.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_dora.errors import DoRAError
from mlx_dora.evaluate.loss import eval_mode
from mlx_dora.train.grpo.config import RewardConfig

Filter = Callable[[mx.array], mx.array]


@dataclass(frozen=True, kw_only=True)
class Completion:
    """A sampled completion.

    Args:
        tokens: Its tokens, including the end token or stop word.
        is_stopped: Whether it ended by itself; otherwise it was cut at the maximum
            length.
    """

    tokens: list[int]
    is_stopped: bool


def sample_completions(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[Sequence[int]],
    config: RewardConfig,
) -> list[list[Completion]]:
    """Sample several completions of each prompt.

    The prompt is processed once for all its completions.

    Args:
        model: An mlx-lm model.
        tokenizer: Its tokenizer, whose end tokens end a completion.
        prompts: Tokens of each prompt.
        seeds: For each prompt, the seeds of its completions: whole numbers below 2**64.
        config: Temperature, filters, length and stop words.

    Returns:
        The completions of each prompt, in the order of its seeds.

    Raises:
        DoRAError: If a prompt is empty, or the model's cache cannot be batched.
    """
    from mlx_lm.generate import BatchGenerator, make_stop_sequences

    filters = _filters(config)
    stops = make_stop_sequences(tokenizer, list(config.stop_words))
    with eval_mode(model):
        generator: Any = BatchGenerator(
            model,
            completion_batch_size=config.sampling_rows,
            prefill_batch_size=config.sampling_rows,
            stream=mx.default_stream(mx.default_device()),
        )
        try:
            numbers = []
            for prompt, own in zip(prompts, seeds, strict=True):
                cache, rows = _processed(model, prompt), len(own)
                numbers += generator.insert_segments(
                    [[[prompt[-1]]] for _ in own],
                    max_tokens=[config.max_completion_length] * rows,
                    caches=[cache] * rows,  # copied when they join the batch
                    all_tokens=[list(prompt[:-1]) for _ in own],
                    samplers=[
                        _Sampler(seed, config.temperature, filters) for seed in own
                    ],
                    stop_sequences=[stops] * rows,
                )
            found = _finished(generator, numbers)
        finally:
            generator.close()
    in_order = iter(numbers)
    return [[found[next(in_order)] for _ in own] for own in seeds]


def row_seeds(seed: Sequence[int], count: int) -> list[int]:
    """Seeds of a prompt's completions, below 2**64, from numbers that identify it."""
    states = np.random.SeedSequence(list(seed)).generate_state(count, np.uint64)
    return [int(value) for value in states]


class _Sampler:
    """Draws the tokens of a single completion."""

    def __init__(self, seed: int, temperature: float, filters: list[Filter]) -> None:
        self._key = mx.random.key(seed)
        self._scale = 1 / temperature
        self._filters = filters

    def __call__(self, logprobs: mx.array) -> mx.array:
        # Temperature first, then the filters: the order of transformers and vLLM.
        scaled = logprobs.astype(mx.float32) * self._scale
        if self._filters:
            scaled = scaled - mx.logsumexp(scaled, axis=-1, keepdims=True)
        for keep in self._filters:
            scaled = keep(scaled)
        self._key, own = mx.random.split(self._key)
        return mx.random.categorical(scaled, key=own)


def _filters(config: RewardConfig) -> list[Filter]:
    from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p

    filters: list[Filter] = []
    if config.top_k:
        filters.append(lambda scaled: apply_top_k(scaled, config.top_k))
    if config.top_p < 1:
        filters.append(lambda scaled: apply_top_p(scaled, config.top_p))
    if config.min_p:
        filters.append(partial(apply_min_p, min_p=config.min_p))
    return filters


def _processed(model: Any, prompt: Sequence[int]) -> list[Any]:
    """The cache of a prompt's tokens but the last."""
    from mlx_lm.models.cache import make_prompt_cache

    if not prompt:
        raise DoRAError("a prompt has no tokens.")
    cache = make_prompt_cache(model)
    if not all(hasattr(part, "merge") for part in cache):
        raise DoRAError(
            f"{type(model).__module__.rpartition('.')[2]} models cannot be sampled in "
            "batches (their cache cannot be merged), so grpo cannot train them."
        )
    if len(prompt) > 1:
        model(mx.array([list(prompt[:-1])]), cache=cache)
        mx.eval([part.state for part in cache])
    return cache


def _finished(generator: Any, numbers: Sequence[int]) -> dict[int, Completion]:
    tokens: dict[int, list[int]] = {number: [] for number in numbers}
    found: dict[int, Completion] = {}
    while len(found) < len(numbers):
        for response in generator.next_generated():
            tokens[response.uid].append(response.token)
            if response.finish_reason is not None:
                found[response.uid] = Completion(
                    tokens=tokens[response.uid],
                    is_stopped=response.finish_reason == "stop",
                )
    return found
