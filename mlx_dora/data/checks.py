"""Checks of rows; an error names the file, the line and the key."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mlx_dora.data.conversations import key_names, text_of
from mlx_dora.data.formats import FORMATS, TOKENS, Format, recognize
from mlx_dora.data.messages import parsed_arguments
from mlx_dora.data.rows import Rows
from mlx_dora.errors import DoRAError

_HALF = re.compile("[\ud800-\udfff]")


def format_of(rows: Rows) -> Format:
    """Determine the format of a source from its first row.

    Raises:
        DoRAError: If there are no rows, or the first row has the columns of no format.
    """
    if not len(rows.values):
        raise DoRAError(f"{rows.source} has no rows.")
    first = rows.values[0]
    if not isinstance(first, Mapping):
        return TOKENS
    if (format := recognize(first, rows.config)) is not None:
        return format
    known = (" and ".join(map(repr, f.required(rows.config))) for f in FORMATS)
    raise DoRAError(
        f"{rows.where(0)}: expected the columns {', or '.join(known)}; found "
        f"{key_names(first)}. Name yours, for instance with --prompt-feature and "
        "--completion-feature."
    )


def check_row(rows: Rows, index: int, format: Format) -> None:
    """Check one row against the format of the first.

    Raises:
        DoRAError: If the row is malformed; names the file, line and problem.
    """
    row, where = rows.values[index], rows.where(index)
    if format is TOKENS:
        _check_tokens(rows, index)
        return
    if not isinstance(row, Mapping):
        came = type(row).__name__
        raise DoRAError(f"{where}: expected a mapping, got a {came}.")
    expected = format.required(rows.config)
    if any(key not in row for key in expected):
        wanted = " and ".join(repr(key) for key in expected)
        noun = "key" if len(expected) == 1 else "keys"
        raise DoRAError(
            f"{where}: expected the {noun} {wanted}, as in the first row; "
            f"found {key_names(row)}."
        )
    if format.read is None:
        text_of(row, expected[0], where)
    else:
        messages = format.messages(row, rows.config, where)
        _check_messages(rows, messages, f"{where}: {expected[0]!r}")
    for key in (*expected, *format.optional):
        check_characters(rows, index, key)


def _check_messages(rows: Rows, messages: list[Any], where: str) -> None:
    masks_prompt = rows.config.mask_prompt and not rows.config.all_turns
    if masks_prompt and [m["role"] for m in messages] == ["assistant"]:
        raise DoRAError(
            f"{where} is a single assistant message: there is no prompt before "
            "the answer for mask_prompt to mask. Add the user's turn before the "
            "answer, remove the row, or use all_turns."
        )
    parsed_arguments(messages, where)


def check_characters(rows: Rows, index: int, key: str) -> None:
    """Refuse unpaired surrogates, which no tokenizer can encode."""
    for place, text in _texts(rows.values[index].get(key), key):
        if half := _HALF.search(text):
            raise DoRAError(
                f"{rows.where(index)}: character {half.start() + 1} of {place} is "
                f"\\u{ord(half[0]):04x}, half of a surrogate pair (an emoji or rare "
                "character cut in two): not valid Unicode. Remove or replace it."
            )


def _texts(value: Any, place: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield place, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _texts(inner, f"{place}.{key}")
    elif isinstance(value, Sequence):
        for number, inner in enumerate(value):
            yield from _texts(inner, f"{place}[{number}]")


def _check_tokens(rows: Rows, index: int) -> None:
    row = rows.values[index]
    if isinstance(row, Sequence) and not isinstance(row, str):
        has_targets = len(row) == 2 and isinstance(row[0], Sequence)
        tokens = row[0] if has_targets else row
        if all(isinstance(token, int) for token in tokens):
            return
    raise DoRAError(
        f"{rows.where(index)}: expected a mapping such as {{'text': ...}} or a list of "
        f"token ids, got {type(row).__name__}."
    )
