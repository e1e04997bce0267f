"""Sampled completions, on a random tiny model."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_dora import DoRAConfig, apply_dora
from mlx_dora.errors import DoRAError
from mlx_dora.layers import DoRALayer
from mlx_dora.train.grpo import sampling
from mlx_dora.train.grpo.config import RewardConfig
from mlx_dora.train.grpo.sampling import Completion, row_seeds, sample_completions

PROMPTS = [[5, 6, 7, 8], [9], [10, 11]]
END = 2


class Tokenizer:
    """What the sampler needs of a tokenizer."""

    eos_token_ids = (END,)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord(letter) - ord("a") + 3 for letter in text]


@pytest.fixture
def model(tiny_model: nn.Module) -> nn.Module:
    apply_dora(tiny_model, DoRAConfig(rank=4, num_layers=-1))
    for name, value in [("lora_b", 0.3), ("m", 1.0)]:
        for module in tiny_model.modules():
            if isinstance(module, DoRALayer):
                noise = mx.random.normal(module[name].shape) * value * 0.3
                module[name] = module[name] + noise
    tiny_model.train()
    return tiny_model


def sample(model: nn.Module, count: int = 3, **settings: Any) -> list[list[Completion]]:
    config = RewardConfig(**{"max_completion_length": 6, **settings})
    seeds = [row_seeds([1, number], count) for number in range(len(PROMPTS))]
    return sample_completions(model, Tokenizer(), PROMPTS, seeds, config)


def tokens(found: list[list[Completion]]) -> list[list[list[int]]]:
    return [[one.tokens for one in group] for group in found]


def test_each_completion_has_random_numbers_of_its_own(model: nn.Module) -> None:
    whole = sample(model)
    assert tokens(sample(model)) == tokens(whole)
    assert len({tuple(row) for group in tokens(whole) for row in group}) == 9
    # In batches of other completions, with other numbers drawn before.
    mx.random.seed(9)
    assert tokens(sample(model, sampling_rows=2)) == tokens(whole)
    assert tokens(sample(model, count=1)) == [[group[0]] for group in tokens(whole)]


def test_completions_follow_the_model_with_its_adapter(model: nn.Module) -> None:
    """At a low temperature, each token is the most likely after those before it."""
    found = sample(model, temperature=1e-4, max_completion_length=5)
    model.eval()
    for prompt, group in zip(PROMPTS, found, strict=True):
        row = list(prompt)
        for _ in range(5):
            row.append(int(model(mx.array([row]))[0, -1].argmax()))
        expected = row[len(prompt) :]
        if END in expected:
            expected = expected[: expected.index(END) + 1]
        assert [one.tokens for one in group] == [expected] * 3


def test_probabilities_are_those_of_the_temperature(model: nn.Module) -> None:
    """First tokens of many completions, against the model's distribution."""
    count, temperature = 600, 0.5
    seeds = [row_seeds([7], count)]
    config = RewardConfig(
        max_completion_length=1, temperature=temperature, top_k=4, sampling_rows=200
    )
    found = sample_completions(model, Tokenizer(), [[5, 6]], seeds, config)
    model.eval()
    scaled = np.array(model(mx.array([[5, 6]]))[0, -1], np.float64) / temperature
    best = np.argsort(scaled)[-4:]
    wanted = np.exp(scaled[best]) / np.exp(scaled[best]).sum()
    drawn = [one.tokens[0] for one in found[0]]
    assert {*drawn} <= {*best.tolist()}
    shares = np.array([drawn.count(token) for token in best]) / count
    assert np.abs(shares - wanted).max() < 4 * np.sqrt(0.25 / count)


@pytest.mark.parametrize(
    ("settings", "kept"), [({"top_p": 0.5}, 2), ({"min_p": 0.5}, 2), ({"top_k": 1}, 1)]
)
def test_filters_apply_after_the_temperature(settings: Any, kept: int) -> None:
    # At temperature 1, top_p 0.5 would keep one token of these and min_p 0.5 one.
    logprobs = mx.log(mx.array([[0.6, 0.25, 0.1, 0.05]]))
    config = RewardConfig(temperature=2.0, **settings)
    filters = sampling._filters(config)
    drawn = {
        int(sampling._Sampler(seed, config.temperature, filters)(logprobs))
        for seed in range(200)
    }
    assert drawn == {*range(kept)}


def test_end_tokens_and_stop_words_end_a_completion(model: nn.Module) -> None:
    free = sample(model, count=20, max_completion_length=12)
    ended = [one for group in free for one in group if one.is_stopped]
    cut = [one for group in free for one in group if not one.is_stopped]
    assert all(END not in one.tokens and len(one.tokens) == 12 for one in cut)
    assert all(one.tokens.index(END) == len(one.tokens) - 1 for one in ended)
    pair = cut[0].tokens[3:5]
    word = "".join(chr(token - 3 + ord("a")) for token in pair)
    stopped = sample(model, count=20, max_completion_length=12, stop_words=(word,))
    first = [one for group in stopped for one in group if one.tokens[-2:] == pair]
    assert first
    assert all(one.is_stopped for one in first)


def test_norms_are_computed_once_for_all_completions(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_dora.layers import _layer

    calls: list[Any] = []
    real = _layer.exact_terms
    monkeypatch.setattr(
        _layer, "exact_terms", lambda *a: (calls.append(a), real(*a))[1]
    )
    sample(model)
    layers = [m for m in model.modules() if isinstance(m, DoRALayer)]
    assert len(calls) == len(layers)
    assert model.training


def test_an_empty_prompt_is_refused(model: nn.Module) -> None:
    with pytest.raises(DoRAError, match="a prompt has no tokens"):
        sample_completions(model, Tokenizer(), [[]], [[1]], RewardConfig())


def test_a_model_whose_cache_cannot_be_merged_is_refused(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.make_cache = lambda: [object()]
    with pytest.raises(DoRAError, match="llama models cannot be sampled in batches"):
        sample(model)
