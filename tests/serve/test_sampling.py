from types import SimpleNamespace
from typing import Any

import mlx.core as mx
from mlx_lm.server import SamplingArguments

from mlx_dora.serve.sampling import Samplers

TOKENIZER: Any = SimpleNamespace(encode=lambda text: [1], eos_token_ids={2})
LOGPROBS = mx.log(mx.softmax(mx.arange(50.0)[None] / 20))


def args(temperature: float, seed: int | None = None) -> Any:
    sampling = SamplingArguments(temperature, 1.0, 0, 0.0, 0.0, 0.1)
    return SimpleNamespace(sampling=sampling, seed=seed)


def draw(sampler: Any, count: int = 12) -> list[int]:
    return [sampler(LOGPROBS).item() for _ in range(count)]


def test_equal_settings_share_a_sampler() -> None:
    samplers = Samplers(TOKENIZER)
    assert samplers.sampler(args(0.5)) is samplers.sampler(args(0.5))
    assert samplers.sampler(args(0.5)) is not samplers.sampler(args(0.7))
    assert samplers.sampler(args(0.5, seed=1)) is not samplers.sampler(args(0.5, 1))


def test_a_seed_draws_the_same_tokens_whatever_others_draw() -> None:
    samplers = Samplers(TOKENIZER)
    alone = draw(samplers.sampler(args(1.0, seed=3)))
    first, other = (samplers.sampler(args(1.0, seed=seed)) for seed in (3, 4))
    mixed, others = [], []
    for _ in range(12):
        mixed += draw(first, 1)
        others += draw(other, 1) + draw(samplers.sampler(args(1.0)), 1)
    assert mixed == alone
    assert others[::2] != alone


def test_requests_without_a_seed_differ() -> None:
    samplers = Samplers(TOKENIZER)
    draw(samplers.sampler(args(1.0, seed=3)))
    first = draw(samplers.sampler(args(1.0)))
    draw(samplers.sampler(args(1.0, seed=3)))
    assert draw(samplers.sampler(args(1.0))) != first
