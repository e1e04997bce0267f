"""What would be trained: lengths, rows cut or skipped, repeated rows, and samples."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mlx_dora.data.counts import RowCounts, RowSizes, measure_rows
from mlx_dora.data.dataset import Dataset
from mlx_dora.data.samples import Sample, sample
from mlx_dora.data.targets import Example, count_targets


@dataclass(frozen=True, kw_only=True)
class Note:
    """A row that is not trained as it stands.

    Args:
        where: File and line of the row.
        tokens: Number of tokens before cutting.
        what: What happens to the row, and why.
        is_skipped: Whether the row is left out.
    """

    where: str
    tokens: int
    what: str
    is_skipped: bool


@dataclass(frozen=True, kw_only=True)
class SplitSurvey:
    """The rows of one split.

    Args:
        name: ``"train"``, ``"valid"`` or ``"test"``.
        lengths: Tokens of each row before cutting.
        trained: Sizes of the rows that are not skipped.
        tokens: Number of tokens after cutting.
        targets: Number of tokens that count in the loss, after cutting.
        notes: Rows that are cut, skipped or shown incompletely by the chat template.
        samples: Some rows, spread over the split.
    """

    name: str
    lengths: tuple[int, ...]
    trained: RowSizes
    tokens: int
    targets: int
    notes: tuple[Note, ...]
    samples: tuple[Sample, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values, with a histogram instead of every row's length."""
        values = asdict(self)
        del values["trained"]
        lengths = values.pop("lengths")
        return {
            **values,
            "rows": len(lengths),
            "skipped": sum(note.is_skipped for note in self.notes),
            "longest": max(lengths),
            "histogram": histogram(lengths),
        }


@dataclass(frozen=True, kw_only=True)
class Repeat:
    """Two equal rows.

    Args:
        first: File and line of the first.
        second: File and line of its repetition.
        leaks: Whether the rows stand in different splits.
    """

    first: str
    second: str
    leaks: bool


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What would be trained from a data set.

    Args:
        max_seq_length: Number of tokens after which rows are cut.
        splits: The splits that exist.
        repeats: Rows with the same tokens as an earlier row.
    """

    max_seq_length: int
    splits: tuple[SplitSurvey, ...]
    repeats: tuple[Repeat, ...]


def take_survey(
    sets: Mapping[str, Dataset | None],
    tokenizer: Any,
    *,
    max_seq_length: int,
    samples: int,
    unit: int = 1,
) -> Survey:
    """Tokenize every row and describe what training would make of it.

    Args:
        sets: The data sets by split, from `mlx_dora.data.load_datasets`.
        tokenizer: mlx-lm's tokenizer.
        max_seq_length: Number of tokens after which rows are cut.
        samples: Number of samples per split.
        unit: Number of consecutive examples that are used or left out together, such as
            the two of a pair.
    """
    splits, repeats = [], []
    seen: dict[tuple[int, ...], tuple[str, str]] = {}
    for name, data in sets.items():
        if data is None:
            continue
        notes, tokens, targets = [], 0, 0
        for index in range(len(data)):
            example, where = data[index], data.where(index)
            note = _note(example, where, max_seq_length)
            notes += [note] if note is not None else []
            tokens += min(len(example[0]), max_seq_length)
            targets += count_targets(example, max_seq_length)
            split, first = seen.setdefault(tuple(example[0]), (name, where))
            if first != where:
                leaks = split != name
                repeats.append(Repeat(first=first, second=where, leaks=leaks))
        total = len(data) // unit
        count = min(samples, total)
        starts = [unit * (place * total // count) for place in range(count)]
        chosen = [start + place for start in starts for place in range(unit)]
        splits.append(
            SplitSurvey(
                name=name,
                lengths=tuple(len(data[index][0]) for index in range(len(data))),
                trained=measure_rows(data, unit, max_seq_length),
                tokens=tokens,
                targets=targets,
                notes=tuple(notes),
                samples=tuple(
                    sample(data[i], data.where(i), tokenizer, max_seq_length)
                    for i in chosen
                ),
            )
        )
    return Survey(
        max_seq_length=max_seq_length, splits=tuple(splits), repeats=tuple(repeats)
    )


def _note(example: Example, where: str, most: int) -> Note | None:
    counts, size = RowCounts(), len(example[0])
    usable = counts.add(example, most)
    parts = []
    if counts.truncated:
        parts.append(f"cut, loses {size - most} of {size} tokens")
    if counts.unlocated:
        parts.append("the chat template does not show every answer")
    if counts.unanswered:
        parts = ["skipped: no answer to learn"]
    elif not usable:
        parts.append(f"skipped: no target within {most} tokens")
    if not parts:
        return None
    return Note(where=where, tokens=size, what="; ".join(parts), is_skipped=not usable)


def histogram(lengths: Sequence[int], most: int = 12) -> list[tuple[int, int, int]]:
    """Count lengths in at most `most` bins of equal width.

    Returns:
        For each bin, its first and last length and the number of rows.
    """
    if not lengths:
        return []
    longest = max(lengths)
    widths = (factor * 10**power for power in range(12) for factor in (1, 2, 5))
    width = next(width for width in widths if width * most >= longest)
    counts = [0] * -(-max(longest, 1) // width)
    for length in lengths:
        counts[max(length - 1, 0) // width] += 1
    return [
        (1 + place * width, (place + 1) * width, count)
        for place, count in enumerate(counts)
    ]
