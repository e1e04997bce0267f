"""mlx-lm's cache of processed prompts, with two faults avoided.

Import this module inside functions only: importing mlx_lm takes a second.
"""

from collections.abc import Hashable
from typing import Any

from mlx_lm.models.cache import LRUPromptCache


class PromptCache(LRUPromptCache):
    """Caches of processed tokens by owner: a model, or an adapter's version."""

    def fetch_nearest_cache(
        self, model: Hashable, tokens: list[int]
    ) -> tuple[list[Any] | None, list[int]]:
        """Return a copy of the owner's nearest cache, and the tokens it lacks.

        At least the last token is left to process. With an entry for exactly these
        tokens, mlx-lm's method leaves none, and its batch generator then fails on a
        prompt without tokens, which ends the generation thread.
        """
        cache, rest = super().fetch_nearest_cache(model, tokens)
        if rest:
            return cache, rest
        cache, rest = super().fetch_nearest_cache(model, tokens[:-1])
        return cache, [*rest, *tokens[-1:]]

    def forget(self, model: Hashable) -> None:
        """Drop all entries of an owner."""
        for entries in self._lru._lrus.values():
            for owner, tokens in [pair for pair in entries if pair[0] == model]:
                entries.remove((owner, tokens))
                entry = self._trie.pop(owner, tokens)
                self._n_bytes -= entry.nbytes
                self._n_bytes_by_type[entry.cache_type] -= entry.nbytes
        self._trie._trie.pop(model, None)
