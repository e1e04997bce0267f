"""mlx-lm's batch generator with another adapter for each row."""

from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.generate import BatchGenerator, generate_step
from mlx_lm.models.cache import make_prompt_cache

from mlx_dora import remove_dora
from mlx_dora.adapters.attach import attach_adapter
from mlx_dora.adapters.gathered import GatheredAdapters
from mlx_dora.layers.gathered import BASE
from mlx_dora.serve.rows import AdapterRows, RoutedModel
from tests.adapters.test_gathered import eight

PROMPTS = [[5 + i, 17, *range(40, 40 + 3 * i)] for i in range(9)]


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    steps = generate_step(mx.array(prompt), model, max_tokens=count)
    return [int(token) for token, _ in steps]


@pytest.mark.parametrize("bits", [None, 4])
def test_a_batch_gives_the_greedy_tokens_of_each_adapter_alone(
    bits: int | None, make_tiny_model: Any
) -> None:
    model = make_tiny_model(bits=bits)
    model.eval()
    adapters = eight(model)
    expected = []
    for prompt, adapter in zip(PROMPTS, [*adapters, None], strict=True):
        if adapter is not None:
            attach_adapter(model, adapter)
            model.eval()
        expected.append(greedy(model, prompt, 12))
        remove_dora(model)
    assert len({tuple(tokens) for tokens in expected}) == 9

    gathered = GatheredAdapters(model)
    keys = [*(gathered.add(adapter) for adapter in adapters), BASE]
    batch = BatchGenerator(
        RoutedModel(model, gathered),  # pyright: ignore[reportArgumentType]
        completion_batch_size=6,  # rows join and leave
        prefill_batch_size=3,
        prefill_step_size=8,
    )
    lengths = [12 - i for i in range(9)]
    uids = batch.insert(
        PROMPTS,
        max_tokens=lengths,
        caches=[[*make_prompt_cache(model), AdapterRows([key])] for key in keys],
    )
    tokens: dict[int, list[int]] = {uid: [] for uid in uids}
    while responses := batch.next_generated():
        for response in responses:
            tokens[response.uid].append(response.token)
            if response.prompt_cache is not None:
                row = response.prompt_cache[-1]
                assert row.keys == [keys[uids.index(response.uid)]]
    for uid, truth, length in zip(uids, expected, lengths, strict=True):
        assert tokens[uid] == truth[:length]


def test_rows_follow_every_change_of_a_batch() -> None:
    rows = AdapterRows.merge([AdapterRows([3]), AdapterRows([0]), AdapterRows([5])])
    rows.extend(AdapterRows([7, 8]))
    rows.filter([0, 2, 4])
    assert rows.keys == [3, 5, 8]
    rows.filter(mx.array([2, 0]))
    assert rows.keys == [8, 3]
    assert rows.extract(1).keys == [3]
    assert rows.trim(4) == 4
    assert (rows.nbytes, rows.state, rows.empty()) == (0, [], False)


def test_a_batch_with_other_rows_than_its_cache_is_a_bug(tiny_model: Any) -> None:
    routed = RoutedModel(tiny_model, GatheredAdapters(tiny_model))
    cache = [*make_prompt_cache(tiny_model), AdapterRows([BASE])]
    with pytest.raises(AssertionError, match="other rows"):
        routed(mx.zeros((2, 1), dtype=mx.int32), cache=cache)
    with pytest.raises(AssertionError, match="names no adapters"):
        routed(mx.zeros((1, 1), dtype=mx.int32), cache=cache[:-1])
