import mlx.core as mx
from mlx_lm.models.cache import KVCache, LRUPromptCache

from mlx_dora.serve.prompt_cache import PromptCache


def filled(tokens: list[int]) -> list[KVCache]:
    cache = KVCache()
    cache.update_and_fetch(*(mx.ones((1, 1, len(tokens), 2)) for _ in range(2)))
    return [cache]


def test_the_last_token_is_always_left() -> None:
    cache, theirs = PromptCache(10), LRUPromptCache(10)
    for each in (cache, theirs):
        each.insert_cache(1, [4, 5, 6], filled([4, 5, 6]))
    assert theirs.fetch_nearest_cache(1, [4, 5, 6])[1] == []  # which mlx-lm cannot use
    found, rest = cache.fetch_nearest_cache(1, [4, 5, 6])
    assert rest == [5, 6]
    assert found is not None
    assert found[0].offset == 1
    assert cache.fetch_nearest_cache(1, [4, 5, 6, 7])[1] == [7]
    assert cache.fetch_nearest_cache(1, [9]) == (None, [9])


def test_an_entry_belongs_to_its_owner() -> None:
    cache = PromptCache(10)
    cache.insert_cache(1, [4, 5, 6], filled([4, 5, 6]))
    assert cache.fetch_nearest_cache(2, [4, 5, 6, 7]) == (None, [4, 5, 6, 7])


def test_a_forgotten_owner_has_no_entries_and_no_bytes() -> None:
    cache = PromptCache(10)
    cache.insert_cache(1, [4, 5, 6], filled([4, 5, 6]))
    cache.insert_cache(1, [7, 5], filled([7, 5]), cache_type="system")
    cache.insert_cache(2, [4, 5], filled([4, 5]))
    bytes_of_two = filled([4, 5])[0].nbytes
    cache.forget(1)
    assert cache.fetch_nearest_cache(1, [4, 5, 6, 7]) == (None, [4, 5, 6, 7])
    assert cache.fetch_nearest_cache(2, [4, 5, 6])[1] == [6]
    assert (len(cache), cache.nbytes) == (1, bytes_of_two)
    cache.forget(3)
    for number in range(20):  # its bookkeeping still evicts
        cache.insert_cache(2, [number, 1], filled([number, 1]))
    assert len(cache) == 10
