from pathlib import Path
from typing import Any

import pytest

from mlx_dora.data import DataConfig, as_dataset
from mlx_dora.data.counts import RowSizes
from mlx_dora.data.survey import Repeat, Survey, histogram, take_survey


@pytest.fixture
def tokenizer(tiny_model_folder: Path) -> Any:
    from mlx_lm.utils import load_tokenizer

    return load_tokenizer(tiny_model_folder)


def survey(
    tokenizer: Any, most: int, samples: int, splits: dict[str, list[Any]], **config: Any
) -> Survey:
    sets = {
        name: as_dataset(rows, tokenizer, DataConfig(**config), name)
        for name, rows in splits.items()
    }
    return take_survey(sets, tokenizer, max_seq_length=most, samples=samples)


def test_a_sample_is_divided_into_trained_read_and_cut(tokenizer: Any) -> None:
    rows = [{"prompt": "hi", "completion": "a🙂b🙂"}]
    (whole,) = survey(tokenizer, 100, 1, {"train": rows}, mask_prompt=True).splits
    (sample,) = whole.samples
    head = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert [(piece.kind, piece.text) for piece in sample.pieces] == [
        ("context", head),
        ("target", "a🙂b🙂<|im_end|>\n"),
    ]
    assert sample.where == "train, row 0"
    # Cut inside the last character, whose four bytes are four tokens.
    most = sample.tokens - 4
    (cut,) = survey(tokenizer, most, 1, {"train": rows}, mask_prompt=True).splits
    assert [(piece.kind, piece.text) for piece in cut.samples[0].pieces] == [
        ("context", head),
        ("target", "a🙂b"),
        ("cut", "🙂<|im_end|>\n"),
    ]
    assert cut.notes[0].what == f"cut, loses 4 of {sample.tokens} tokens"
    assert not cut.notes[0].is_skipped


def test_every_turn_of_a_sample_is_marked(tokenizer: Any) -> None:
    turns = [
        {"from": "human", "value": "one"},
        {"from": "gpt", "value": "1"},
        {"from": "human", "value": "two"},
        {"from": "gpt", "value": "2"},
    ]
    rows = [{"conversations": turns}]
    (split,) = survey(tokenizer, 100, 1, {"train": rows}, all_turns=True).splits
    targets = [p.text for p in split.samples[0].pieces if p.kind == "target"]
    assert targets == ["1<|im_end|>\n", "2<|im_end|>\n"]


def test_skipped_rows_say_why_and_are_not_counted_as_trained(tokenizer: Any) -> None:
    question = {"role": "user", "content": "the quick brown fox jumps"}
    answer = {"role": "assistant", "content": "yes"}
    rows = [{"messages": [question]}, {"messages": [question, answer]}]
    (split,) = survey(tokenizer, 12, 0, {"train": rows}, mask_prompt=True).splits
    assert [(note.where, note.what, note.is_skipped) for note in split.notes] == [
        ("train, row 0", "skipped: no answer to learn", True),
        (
            "train, row 1",
            f"cut, loses {split.lengths[1] - 12} of {split.lengths[1]} tokens; "
            "skipped: no target within 12 tokens",
            True,
        ),
    ]
    assert split.trained == RowSizes(lengths=(), targets=())
    assert (split.targets, split.samples) == (0, ())


def test_rows_that_stand_twice_are_listed_and_those_in_two_splits_leak(
    tokenizer: Any,
) -> None:
    fox, dog, cat = ({"text": text} for text in ("a fox", "a dog", "a cat"))
    found = survey(tokenizer, 9, 1, {"train": [fox, dog, fox], "valid": [cat, dog]})
    assert found.repeats == (
        Repeat(first="train, row 0", second="train, row 2", leaks=False),
        Repeat(first="train, row 1", second="valid, row 1", leaks=True),
    )


def test_counts_are_after_cutting(tokenizer: Any) -> None:
    rows = [
        {"text": "the fox"},
        {"text": "the quick brown fox jumps over the lazy dog"},
    ]
    (split,) = survey(tokenizer, 6, 2, {"train": rows}).splits
    assert split.lengths == (3, 10)
    assert split.trained == RowSizes(lengths=(3, 10), targets=(2, 9))
    assert (split.tokens, split.targets) == (3 + 6, 2 + 5)
    content = split.to_dict()
    assert (content["rows"], content["longest"], content["skipped"]) == (2, 10, 0)
    assert content["histogram"] == [(n, n, int(n in (3, 10))) for n in range(1, 11)]


def test_a_histogram_has_round_bins() -> None:
    assert histogram([1, 50, 51, 230]) == [
        (1, 20, 1),
        (21, 40, 0),
        (41, 60, 2),
        *((1 + 20 * n, 20 + 20 * n, 0) for n in range(3, 11)),
        (221, 240, 1),
    ]
    assert histogram([0]) == [(1, 1, 1)]
    assert histogram([]) == []
