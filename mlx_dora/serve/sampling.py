"""Samplers of a batch: one for all requests with the same settings.

Import this module inside functions only: importing mlx_lm takes a second.
"""

import random
from collections.abc import Callable, Hashable
from dataclasses import astuple
from typing import Any

import mlx.core as mx
from mlx_lm import server

Sampler = Callable[[mx.array], mx.array]


class Samplers:
    """Makes samplers; equal settings share one, which then samples all their rows.

    Args:
        tokenizer: The model's tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[Hashable, Sampler] = {}

    def sampler(self, args: Any) -> Sampler:
        """Return the sampler of a request; with a seed, it has its own random state."""
        settings = astuple(args.sampling)
        if settings not in self._known:
            if len(self._known) > 100:
                self._known.clear()
            self._known[settings] = server._make_sampler(args, self._tokenizer)
        shared = self._known[settings]
        return shared if args.seed is None else seeded(shared, args.seed)


def seeded(sampler: Sampler, seed: int) -> Sampler:
    """Return a sampler that draws the same tokens in any batch.

    MLX's random state cannot be set aside, so each token gets a seed of its own, and
    the other requests continue from a fresh one.
    """
    seeds = random.Random(seed)

    def sample(logprobs: mx.array) -> mx.array:
        mx.random.seed(seeds.getrandbits(64))
        tokens = sampler(logprobs)
        mx.random.seed(random.getrandbits(64))
        return tokens

    return sample
