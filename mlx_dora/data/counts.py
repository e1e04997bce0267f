"""Counts of the rows that were truncated or skipped."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn, Self

from mlx_dora.data.targets import (
    Example,
    IncompleteSpans,
    count_targets,
    target_spans,
)
from mlx_dora.errors import DoRAError


@dataclass(frozen=True, kw_only=True)
class RowSizes:
    """Sizes of the rows that are trained; of units such as pairs, one entry for each.

    Args:
        lengths: Tokens of each row; of a unit, of its longest row.
        targets: Number of targets of each row; of a unit, of all its rows.
        unit: Number of rows in a unit.
    """

    lengths: tuple[int, ...]
    targets: tuple[int, ...]
    unit: int = 1

    @classmethod
    def of_lengths(cls, lengths: Sequence[int]) -> Self:
        """The sizes of rows in which every token but the first is a target."""
        targets = tuple(max(length - 1, 0) for length in lengths)
        return cls(lengths=tuple(lengths), targets=targets)

    def lengthened(self, added: int) -> Self:
        """The sizes after a training step adds tokens, which are then the targets."""
        if not added:
            return self
        lengths = tuple(length + added for length in self.lengths)
        targets = (self.unit * (added + 1),) * len(lengths)
        return replace(self, lengths=lengths, targets=targets)


@dataclass
class RowCounts:
    """Counts of rows on their way into batches, each row counted once.

    Args:
        rows: Number of rows.
        truncated: Rows longer than the maximum length.
        skipped: Rows left out because they have no target.
        longest: Length of the longest row, in tokens.
        unanswered: Skipped rows that contain no answer at all.
        unlocated: Rows in which the chat template does not show every answer.
    """

    rows: int = 0
    truncated: int = 0
    skipped: int = 0
    longest: int = 0
    unanswered: int = 0
    unlocated: int = 0

    def add(self, example: Example, max_seq_length: int) -> bool:
        """Count a row; return False if it has no target left."""
        tokens, targets = example
        self.rows += 1
        self.longest = max(self.longest, len(tokens))
        self.truncated += len(tokens) > max_seq_length
        usable = bool(target_spans(targets, min(len(tokens), max_seq_length)))
        self.skipped += not usable
        is_incomplete = isinstance(targets, IncompleteSpans)
        self.unlocated += is_incomplete
        self.unanswered += targets == () and not is_incomplete
        return usable

    def add_unit(self, dataset: Any, start: int, size: int, max_seq_length: int) -> int:
        """Count the examples of a unit, which is used only if each has a target left.

        Args:
            dataset: The examples, as `mlx_dora.data.batches.Examples`.
            start: Index of the unit's first example.
            size: Number of examples in the unit.
            max_seq_length: Rows are cut to this many tokens.

        Returns:
            Length of its longest row after cutting, in tokens; 0 if it is left out.
        """
        skipped = self.skipped
        examples = [dataset[start + place] for place in range(size)]
        usable = [self.add(example, max_seq_length) for example in examples]
        if not all(usable):
            self.skipped = skipped + size
            return 0
        return max(min(len(tokens), max_seq_length) for tokens, _ in examples)

    def describe(self, max_seq_length: int) -> str | None:
        """Summarize truncated and skipped rows in one line; None if there are none."""
        parts = []
        if self.truncated:
            parts.append(
                f"{self.truncated} of {self.rows} rows are longer than "
                f"max_seq_length {max_seq_length} and were cut (longest: "
                f"{self.longest} tokens)"
            )
        if self.unanswered:
            parts.append(
                f"{self.unanswered} of {self.rows} rows have no answer to learn and "
                "were left out (mask_prompt uses the assistant's turn that ends a "
                "row, all_turns every assistant turn)"
            )
        if self.unlocated:
            parts.append(
                f"in {self.unlocated} of {self.rows} rows the chat template does not "
                "show every answer; answers not shown are not trained on"
            )
        if beyond := self.skipped - self.unanswered:
            parts.append(
                f"{beyond} of {self.rows} rows have no target token within "
                f"{max_seq_length} tokens and were left out"
            )
        return "; ".join(parts) or None


def measure_rows(data: Any, unit: int, max_seq_length: int) -> RowSizes:
    """Measure the units whose rows all have a target, uncut.

    Args:
        data: The examples, as `mlx_dora.data.batches.Examples`.
        unit: Number of consecutive examples that are used or left out together.
        max_seq_length: Rows are cut to this many tokens, and need a target in them.
    """
    counts = RowCounts()
    lengths, targets = [], []
    for start in range(0, len(data), unit):
        if counts.add_unit(data, start, unit, max_seq_length):
            rows = [data[start + place] for place in range(unit)]
            lengths.append(max(len(tokens) for tokens, _ in rows))
            targets.append(sum(map(count_targets, rows)))
    return RowSizes(lengths=tuple(lengths), targets=tuple(targets), unit=unit)


def refuse_empty(counts: RowCounts, max_seq_length: int) -> NoReturn:
    """Raise the error that no row has a target."""
    if counts.unanswered == counts.rows:
        raise DoRAError(
            "no row has an answer to learn: mask_prompt needs rows that end with a "
            "turn of role 'assistant', all_turns needs such a turn anywhere."
        )
    raise DoRAError(
        f"no row has a target token within max_seq_length {max_seq_length}: raise it, "
        "or train on the prompt too (no mask_prompt)."
    )
