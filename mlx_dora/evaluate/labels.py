"""Accuracy on data whose answers are labels from a small closed set."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_dora.data.batches import pad_batch
from mlx_dora.data.dataset import Dataset, Parts
from mlx_dora.errors import DoRAError
from mlx_dora.evaluate.loss import eval_mode, target_mask
from mlx_dora.evaluate.token_loss import token_cross_entropy

MAX_LABELS = 20
MAX_LABEL_LENGTH = 40


@dataclass(frozen=True, kw_only=True)
class LabelAccuracy:
    """How often the model ranks a row's own label first.

    Args:
        accuracy: Fraction of the scored rows that are right.
        labels: Number of scored rows per label.
        chosen: How often the model chose each label.
        rows: Number of rows scored.
        rows_skipped: Number of rows skipped because they exceed the maximum length.
    """

    accuracy: float
    labels: dict[str, int]
    chosen: dict[str, int]
    rows: int
    rows_skipped: int = 0


@dataclass(frozen=True, kw_only=True)
class _Row:
    truth: str
    options: tuple[Parts, ...]  # one per label

    @property
    def length(self) -> int:
        return max(len(parts.prompt) + len(parts.answer) for parts in self.options)

    @property
    def first_tokens_decide(self) -> bool:
        prompt = self.options[0].prompt
        firsts = {tuple(p.answer[:1]) for p in self.options if p.prompt == prompt}
        return len(firsts) == len(self.options) and () not in firsts


def find_labels(dataset: Dataset) -> tuple[str, ...] | None:
    """Return the distinct answers of a data set if they look like labels.

    A data set has labels if it has 2 to 20 distinct answers of at most 40 characters,
    and on average at least two rows per answer. Otherwise the result is None.
    """
    seen: set[str] = set()
    for index in range(len(dataset)):
        text = dataset.answer(index)
        if text is None or len(text) > MAX_LABEL_LENGTH:
            return None
        seen.add(text)
        if len(seen) > MAX_LABELS:
            return None
    if len(seen) < 2 or len(dataset) < 2 * len(seen):
        return None
    return tuple(sorted(seen))


def label_accuracy(
    model: nn.Module,
    dataset: Dataset,
    labels: Iterable[str] | None = None,
    *,
    batch_size: int = 4,
    max_seq_length: int = 2048,
    num_rows: int = -1,
    progress: Callable[[int], None] | None = None,
) -> LabelAccuracy:
    """Rank the candidate labels by the likelihood of their tokens after each prompt.

    If all labels differ in their first token, only that token is scored, and a batch of
    prompts needs one forward pass. Otherwise the log-likelihoods of the whole labels
    are compared, including the end of the turn.

    Args:
        model: The model.
        dataset: Completions, or chats that end with an answer.
        labels: The candidates; default: the distinct answers of the data set.
        batch_size: Rows per forward pass.
        max_seq_length: Longer rows are skipped and counted.
        num_rows: Number of rows to score, spread evenly over the data; -1 for all.
        progress: Called after each batch with its number of rows, to which the first
            batch adds those that were skipped.

    Raises:
        DoRAError: If the answers are not labels, or no row fits.
    """
    names = find_labels(dataset) if labels is None else tuple(labels)
    if names is None or len(names) < 2:
        raise DoRAError("label accuracy needs answers from a small set of labels.")
    total = len(dataset)
    wanted = total if num_rows == -1 else min(num_rows, total)
    spread = [_row(dataset, place * total // wanted, names) for place in range(wanted)]
    rows = sorted(
        (row for row in spread if row.length <= max_seq_length), key=lambda r: r.length
    )
    if not rows:
        raise DoRAError(f"no row fits into max_seq_length {max_seq_length}.")
    choices: list[str] = []
    with eval_mode(model):
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            quick = all(row.first_tokens_decide for row in batch)
            score = _first_token_scores if quick else _whole_label_scores
            choices += [names[i] for i in np.argmax(score(model, batch), axis=1)]
            if progress is not None:
                progress(len(batch) + (0 if start else wanted - len(rows)))
    truths = Counter(row.truth for row in rows)
    chosen = Counter(choices)
    right = sum(row.truth == name for row, name in zip(rows, choices, strict=True))
    return LabelAccuracy(
        accuracy=right / len(rows),
        labels={name: truths[name] for name in names},
        chosen={name: chosen[name] for name in names},
        rows=len(rows),
        rows_skipped=wanted - len(rows),
    )


def _row(dataset: Dataset, index: int, names: tuple[str, ...]) -> _Row:
    truth = dataset.answer(index)
    if truth is None or truth not in names:
        raise DoRAError(f"{dataset.where(index)}: the answer is not one of {names}.")
    options = tuple(dataset.parts(index, name) for name in names)
    return _Row(truth=truth, options=options)


def _first_token_scores(model: nn.Module, batch: list[_Row]) -> np.ndarray:
    # One extra target column, so that no prompt is truncated.
    prompts = [row.options[0].prompt for row in batch]
    tokens, _ = pad_batch([([*prompt, 0], 0) for prompt in prompts], 1 << 30)
    logits = model(tokens[:, :-1])
    places = mx.array([len(prompt) - 1 for prompt in prompts])
    candidates = mx.array([[p.answer[0] for p in row.options] for row in batch])
    last = logits[mx.arange(len(batch)), places]
    scores = mx.take_along_axis(last, candidates, axis=1)
    return np.array(scores.astype(mx.float32))


def _whole_label_scores(model: nn.Module, batch: list[_Row]) -> np.ndarray:
    columns = []
    for label in range(len(batch[0].options)):
        options = [row.options[label] for row in batch]
        examples = [(p.prompt + p.answer, len(p.prompt)) for p in options]
        tokens, lengths = pad_batch(examples, 1 << 30)
        targets = tokens[:, 1:]
        losses = token_cross_entropy(model(tokens[:, :-1]).astype(mx.float32), targets)
        mask = target_mask(lengths, targets.shape[1])
        columns.append(np.array(-mx.where(mask, losses, 0.0).sum(axis=1)))
    return np.stack(columns, axis=1)
