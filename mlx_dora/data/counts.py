"""What was cut and left out on the way from rows to batches."""

from dataclasses import dataclass
from typing import NoReturn

from mlx_dora.data.targets import Example, IncompleteSpans, target_spans
from mlx_dora.errors import DoRAError


@dataclass
class RowCounts:
    """What happened to the rows on their way into batches, each row counted once.

    Args:
        rows: All rows.
        truncated: Rows longer than the maximum.
        skipped: Rows left out because they have no target.
        unanswered: Those of them that hold no answer, of whatever length.
        unlocated: Rows in which the chat template does not show every answer.
        longest: Tokens of the longest row.
    """

    rows: int = 0
    truncated: int = 0
    skipped: int = 0
    longest: int = 0
    unanswered: int = 0
    unlocated: int = 0

    def add(self, example: Example, max_seq_length: int) -> bool:
        """Count one row; False if no target is left in it."""
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

    def describe(self, max_seq_length: int) -> str | None:
        """One line on what was cut or left out; None if nothing was."""
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
                "were left out (mask_prompt takes the assistant's turn that ends a "
                "row, all_turns every turn of the assistant's)"
            )
        if self.unlocated:
            parts.append(
                f"in {self.unlocated} of {self.rows} rows the chat template does not "
                "show every answer; what it does not show does not count"
            )
        if beyond := self.skipped - self.unanswered:
            parts.append(
                f"{beyond} of {self.rows} rows have no target token within "
                f"{max_seq_length} tokens and were left out"
            )
        return "; ".join(parts) or None


def refuse_empty(counts: RowCounts, max_seq_length: int) -> NoReturn:
    """Say that there is nothing to train on or to measure."""
    if counts.unanswered == counts.rows:
        raise DoRAError(
            "no row has an answer to learn: mask_prompt needs rows that end with a "
            "turn of role 'assistant', all_turns needs such a turn anywhere."
        )
    raise DoRAError(
        f"no row has a target token within max_seq_length {max_seq_length}: raise it, "
        "or train on the prompt too (no mask_prompt)."
    )
