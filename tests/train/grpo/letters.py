"""A tokenizer of letters, prompts of it, and a reward, for trainings of tiny models."""

from collections.abc import Sequence
from typing import Any

END = 2
FIRST = 3


class Letters:
    """A tokenizer whose tokens are single characters."""

    eos_token_id = END
    eos_token_ids = (END,)
    has_chat_template = False

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord(letter) - ord("a") + FIRST for letter in text]

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = False) -> str:
        kept = [token for token in tokens if token >= FIRST]
        return "".join(chr(token - FIRST + ord("a")) for token in kept)


PROMPTS: list[dict[str, Any]] = [
    {"prompt": text, "wanted": wanted}
    for text, wanted in [("abc", 0), ("defg", 1), ("h", 0), ("ijklmn", 1), ("op", 0)]
]


def parity(
    completion_ids: Sequence[Sequence[int]], wanted: Sequence[int]
) -> list[float]:
    """Share of the tokens that are even, or odd if `wanted` is 1."""
    return [
        sum(token % 2 == odd for token in tokens) / len(tokens)
        for tokens, odd in zip(completion_ids, wanted, strict=True)
    ]


def length(completions: Sequence[str]) -> list[float | None]:
    """A hundredth of the number of characters; None for an empty completion."""
    return [len(text) / 100 or None for text in completions]


def fails_for_abc(prompts: Sequence[str]) -> list[float]:
    """Raises for one of the prompts."""
    if "abc" in prompts:
        raise ValueError("no abc")
    return [0.0 for _ in prompts]
