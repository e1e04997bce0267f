"""What the frozen first blocks of a Llama-like model make of a text, computed once.

Where only the last blocks learn, the others give the same for the same row in every
step, method and learning rate. Rows are padded on the right and attention is causal, so
that a row's activations do not depend on its neighbours.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_dora.evaluate.batches import pad_batch
from mlx_dora.evaluate.schedule import Schedule


class Trunk:
    """Remembers the activations behind the frozen blocks.

    Args:
        model: Its first blocks must stay as they are.
        frozen: How many blocks those are.
    """

    def __init__(self, model: Any, frozen: int) -> None:
        self._inner = model.model
        self._frozen = frozen
        self._known: dict[tuple[int, ...], np.ndarray] = {}

    def activations(self, texts: Sequence[Sequence[int]]) -> mx.array:
        """Activations ``(rows, longest, width)`` of rows of tokens, padded with 0."""
        keys = [tuple(text) for text in texts]
        new = [key for key in keys if key not in self._known]
        if new:
            tokens, _ = pad_batch([([*key], 0) for key in new], 1 << 30)
            hidden = np.array(
                run_blocks(
                    self._inner.layers[: self._frozen], self._inner.embed_tokens(tokens)
                )
            )
            for row, key in enumerate(new):
                self._known[key] = hidden[row, : len(key)].copy()
        found = [self._known[key] for key in keys]
        padded = np.zeros((len(found), max(map(len, found)), found[0].shape[1]), "f4")
        for row, one in enumerate(found):
            padded[row, : len(one)] = one
        return mx.array(padded)

    def batches(self) -> Callable[..., Iterator[Any]]:
        """Batches for `finetune`: activations, tokens and lengths of the rows."""

        def make(
            data: Any, size: int, limit: int, *, seed: int, counts: Any
        ) -> Iterator[Any]:
            schedule = Schedule(data, size, limit, seed=seed, counts=counts)
            number = 0
            while True:
                for rows in schedule.epoch(number):
                    examples = [data[row[0]] for row in rows]
                    texts = [tokens[:limit] for tokens, _ in examples]
                    _, lengths = pad_batch(examples, limit)
                    hidden = self.activations([text[:-1] for text in texts])
                    width = hidden.shape[1] + 1
                    padded = [[*text, *[0] * (width - len(text))] for text in texts]
                    yield (hidden, mx.array(padded)), lengths
                number += 1

        return make


def run_blocks(blocks: Sequence[nn.Module], hidden: mx.array) -> mx.array:
    """Run some blocks with causal attention."""
    for block in blocks:
        hidden = block(hidden, "causal", None)
    return hidden


def next_token_logits(
    model: Any, frozen: int, hidden: mx.array, places: mx.array
) -> mx.array:
    """Logits at `places` ``(rows, n)`` from activations behind the frozen blocks."""
    inner = model.model
    last = run_blocks(inner.layers[frozen:], hidden)
    rows = mx.arange(hidden.shape[0])[:, None]
    return inner.embed_tokens.as_linear(inner.norm(last[rows, places]))
