from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_dora.data.config import DataConfig
from mlx_dora.data.dataset import Dataset
from mlx_dora.data.loading import as_dataset
from mlx_dora.errors import DoRAError
from mlx_dora.evaluate.labels import find_labels, label_accuracy
from tests.evaluate.test_loss import summed


def labelled(folder: Path, answers: list[str], **config: Any) -> Dataset:
    from mlx_lm.utils import load_tokenizer

    rows = [
        {"prompt": "What is it? " + "fox " * (i % 5), "completion": answer}
        for i, answer in enumerate(answers)
    ]
    return as_dataset(rows, load_tokenizer(folder), DataConfig(**config), "rows")


def best_by_likelihood(model: nn.Module, data: Dataset, names: list[str]) -> list[str]:
    """The label with the smallest loss, each scored separately and unpadded."""
    best = []
    for index in range(len(data)):
        costs = []
        for name in names:
            parts = data.parts(index, name)
            tokens = parts.prompt + parts.answer
            costs.append(summed(model, tokens, len(parts.prompt))[0])
        best.append(names[int(np.argmin(costs))])
    return best


class Oracle(nn.Module):
    """Predicts the next token of the rows it was built from."""

    def __init__(self, data: Dataset, vocabulary: int = 320) -> None:
        super().__init__()
        self.forwards = 0
        self._table = {}
        self._vocabulary = vocabulary
        for index in range(len(data)):
            tokens, _ = data[index]
            for end in range(1, len(tokens)):
                self._table[tuple(tokens[:end])] = tokens[end]

    def __call__(self, tokens: mx.array) -> mx.array:
        self.forwards += 1
        logits = np.zeros((*tokens.shape, self._vocabulary), np.float32)
        for row, ids in enumerate(np.array(tokens).tolist()):
            for end in range(1, len(ids) + 1):
                known = self._table.get(tuple(ids[:end]))
                if known is not None:
                    logits[row, end - 1, known] = 5
        return mx.array(logits)


def test_distinct_first_tokens_need_one_forward(
    tiny_model_folder: Path,
) -> None:
    data = labelled(tiny_model_folder, ["spam", "ham"] * 8)
    oracle = Oracle(data)
    result = label_accuracy(oracle, data, batch_size=4)
    assert oracle.forwards == 4
    # Rows 0 and 5, 1 and 6, ... share a prompt, so the table knows the later label.
    assert result.labels == {"ham": 8, "spam": 8}
    assert result.rows == 16


def test_accuracy_of_a_perfect_model(tiny_model_folder: Path) -> None:
    data = labelled(tiny_model_folder, ["spam", "ham", "ham", "spam", "spam"])
    result = label_accuracy(Oracle(data), data, batch_size=2)
    assert result.accuracy == 1
    assert result.chosen == {"ham": 2, "spam": 3}


@pytest.mark.parametrize("names", [["fox", "jumps"], ["the fox", "the dog", "the"]])
def test_ranking_is_by_likelihood(
    make_tiny_model: Callable[..., nn.Module], tiny_model_folder: Path, names: list[str]
) -> None:
    model = make_tiny_model(seed=3)
    data = labelled(tiny_model_folder, (names * 6)[:9])
    result = label_accuracy(model, data, names, batch_size=4)
    if names[0] == "fox":  # the first token decides
        best = []
        for index in range(len(data)):
            parts = [data.parts(index, name) for name in names]
            logits = model(mx.array([parts[0].prompt]))[0, -1]
            best.append(names[int(mx.argmax(logits[[p.answer[0] for p in parts]]))])
    else:
        best = best_by_likelihood(model, data, names)
    truths = [data.answer(i) for i in range(len(data))]
    right = sum(a == b for a, b in zip(best, truths, strict=True))
    assert result.accuracy == pytest.approx(right / 9)
    assert result.chosen == {name: best.count(name) for name in names}


def test_long_rows_are_counted_not_scored(
    tiny_model: nn.Module, tiny_model_folder: Path
) -> None:
    data = labelled(tiny_model_folder, ["spam", "ham"] * 5)
    lengths = sorted(len(data[i][0]) for i in range(10))
    done: list[int] = []
    result = label_accuracy(
        tiny_model, data, max_seq_length=lengths[4], progress=done.append
    )
    assert sum(done) == 10  # so that a bar ends
    assert result.rows + result.rows_skipped == 10
    assert result.rows_skipped > 0


@pytest.mark.parametrize(
    "answers",
    [
        ["spam"] * 6,
        ["one", "two", "three"],
        [str(i) for i in range(30)] * 2,
        ["a long sentence that explains the whole matter", "short"] * 3,
    ],
)
def test_answers_other_than_labels(tiny_model_folder: Path, answers: list[str]) -> None:
    assert find_labels(labelled(tiny_model_folder, answers)) is None


def test_no_labels_is_an_error(tiny_model: nn.Module, tiny_model_folder: Path) -> None:
    with pytest.raises(DoRAError, match="small set of labels"):
        label_accuracy(tiny_model, labelled(tiny_model_folder, ["a", "b", "c"]))
