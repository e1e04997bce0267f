"""Prints a preview of a training: rows with their targets, lengths and memory."""

from typing import TYPE_CHECKING

import click

from mlx_dora.cli._echo import echo
from mlx_dora.cli._progress import size
from mlx_dora.errors import printable

if TYPE_CHECKING:
    from mlx_dora.data.samples import Piece, Sample
    from mlx_dora.data.survey import SplitSurvey, Survey
    from mlx_dora.train.plan.preview import Preview

_BAR = 40
_LISTED = 5
_LONGEST_PIECE = 1200
_BRACKETS = {"context": ("", ""), "target": ("⟦", "⟧"), "cut": ("✂", "")}
_STYLES = {"context": {}, "target": {"fg": "green", "bold": True}, "cut": {"dim": True}}


def show_preview(preview: "Preview") -> None:
    """Print a preview."""
    survey = preview.survey
    for split in survey.splits:
        for sample in split.samples:
            _show_sample(sample, split.name)
    echo("⟦trained⟧, read only, ✂cut off")
    echo("")
    echo(f"{'':<6} {'rows':>8} {'tokens':>12} {'longest':>8} {'trained':>8}", bold=True)
    for split in survey.splits:
        echo(
            f"{split.name:<6} {len(split.lengths):>8,} {split.tokens:>12,} "
            f"{max(split.lengths):>8,} {split.targets / max(split.tokens, 1):>8.1%}"
        )
    _show_lengths(survey.splits[0])
    _show_list(
        f"Rows not trained as they stand (--max-seq-length {survey.max_seq_length}):",
        [f"{n.where}: {n.what}" for split in survey.splits for n in split.notes],
    )
    _show_repeats(survey)
    _show_memory(preview)


def _show_sample(sample: "Sample", split: str) -> None:
    echo(f"{sample.where} ({split}), {sample.tokens:,} tokens:", bold=True)
    for line in _lines(sample.pieces):
        click.echo(f"  {line}")
    echo("")


def _lines(pieces: "tuple[Piece, ...]") -> list[str]:
    """The text of a row as styled lines; long stretches are shortened."""
    lines = [""]
    for piece in pieces:
        opening, closing = _BRACKETS[piece.kind]
        text = piece.text
        if len(text) > _LONGEST_PIECE:
            half = _LONGEST_PIECE // 2
            left = len(text) - 2 * half
            text = f"{text[:half]} … {left:,} characters … {text[-half:]}"
        first, *rest = f"{opening}{text}".removesuffix("\n").split("\n")
        ends = piece.text.endswith("\n")
        parts = [first, *rest]
        parts[-1] += closing
        styled = [
            click.style(printable(part), **_STYLES[piece.kind]) if part else ""
            for part in parts
        ]
        lines[-1] += styled[0]
        lines += styled[1:] + [""] * ends
    return lines if lines[-1] else lines[:-1]


def _show_lengths(split: "SplitSurvey") -> None:
    from mlx_dora.data.survey import histogram

    bins = histogram(split.lengths)
    most = max(count for _, _, count in bins)
    echo("")
    echo(f"Lengths of the rows of {split.name}, in tokens:")
    for low, high, count in bins:
        bar = "█" * round(_BAR * count / most) or ("▏" if count else "")
        echo(f"  {f'{low:,}–{high:,}':>15} {bar} {count:,}")


def _show_list(title: str, lines: list[str]) -> None:
    if lines:
        echo("")
        echo(title)
        for line in lines[:_LISTED]:
            echo(f"  {line}")
        if len(lines) > _LISTED:
            more = len(lines) - _LISTED
            echo(f"  and {more:,} more, which --html and --json list")


def _show_repeats(survey: "Survey") -> None:
    def equal(leaks: bool) -> list[str]:
        rows = [repeat for repeat in survey.repeats if repeat.leaks is leaks]
        return [f"{repeat.second} equals {repeat.first}" for repeat in rows]

    leaked, repeated = equal(leaks=True), equal(leaks=False)
    _show_list(f"Rows in two splits: {len(leaked):,}", leaked)
    _show_list(f"Rows repeated within a split: {len(repeated):,}", repeated)


def _show_memory(preview: "Preview") -> None:
    echo("")
    if preview.plan is None:
        echo(f"No memory plan for {preview.model}: {preview.problem}")
    else:
        plan, verb = preview.plan, "fit" if preview.plan.fits else "do not fit"
        noun = "pairs of rows" if plan.rows_per_unit == 2 else "rows"
        rows = f"{plan.batch_size} {noun} padded to {plan.length:,} tokens, none cut"
        echo(f"{rows}, {verb}: {size(plan.peak)} of {size(preview.limit)}.")
        echo(f"Suggested: {' '.join(preview.flags)}")
    echo("")
    echo(f"{'With these rows':<38} {'16-bit':>10} {'4-bit':>10}  fits", bold=True)
    for model in preview.models:
        echo(
            f"{model.name:<38} {size(model.peak_16bit):>10} "
            f"{size(model.peak_4bit):>10}  {model.fits or 'no'}"
        )
