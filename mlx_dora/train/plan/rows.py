"""The lengths of the training rows, and the largest batches that they fill."""

from collections.abc import Sequence
from dataclasses import replace

from mlx_dora.adapters.hosting import load_tokenizer
from mlx_dora.data.batches import Examples, padded_width
from mlx_dora.data.counts import RowCounts
from mlx_dora.data.loading import load_datasets
from mlx_dora.data.widths import group_by_width
from mlx_dora.errors import DoRAError
from mlx_dora.train.config import TrainConfig
from mlx_dora.train.objectives.objective import Objective


def row_lengths(train: TrainConfig, objective: Objective) -> list[int]:
    """Tokens of each row of the training data that has a target; of units, the longest.

    Raises:
        DoRAError: If there is no training data, or a row is malformed.
    """
    tokenizer = load_tokenizer(
        str(train.model), trust_remote_code=train.trust_remote_code
    )
    make = objective.dataset
    data = load_datasets(train, tokenizer, ["train"], make)["train"]
    if data is None:
        raise DoRAError(f"{train.data} has no train data.")
    lengths = unit_lengths(data, objective.unit or 1, train.max_seq_length)
    return [length + objective.added_tokens for length in lengths]


def unit_lengths(data: Examples, unit: int, max_seq_length: int) -> list[int]:
    """Tokens of the longest row of each unit whose rows all have a target, uncut."""
    counts = RowCounts()
    return [
        max(len(data[start + place][0]) for place in range(unit))
        for start in range(0, len(data), unit)
        if counts.add_unit(data, start, unit, max_seq_length)
    ]


def largest_batches(
    train: TrainConfig, lengths: Sequence[int] | None, rows_per_unit: int = 1
) -> list[TrainConfig]:
    """The settings with the batches that may need the most memory.

    Args:
        train: Settings of the training.
        lengths: Tokens of each row; None if every row has the maximum length.
        rows_per_unit: Rows of the batches for each of `lengths`.

    Returns:
        Settings without ``batch_tokens``, whose batches have ``batch_size`` rows of
        ``max_seq_length`` tokens: one, or with ``batch_tokens`` one for each width.

    Raises:
        DoRAError: If a row is longer than ``batch_tokens``.
    """
    most = train.max_seq_length
    if train.batch_tokens is not None:
        cut = [min(length, most) for length in lengths or [most]]
        room = train.batch_tokens // rows_per_unit
        if max(cut) > room:
            pair = f" / {rows_per_unit} rows a pair" if rows_per_unit > 1 else ""
            raise DoRAError(
                f"batch_tokens {train.batch_tokens}{pair} holds no row of {max(cut)} "
                "tokens, the longest: raise it, or lower max_seq_length."
            )
        shapes = [(room // most, most)]
        if lengths is not None:
            groups = group_by_width(cut, room)
            shapes = [(max(group.sizes), group.width) for group in groups]
        return [
            replace(train, batch_tokens=None, batch_size=rows, max_seq_length=width)
            for rows, width in shapes
        ]
    if lengths is None:
        return [train]
    longest = max(sum(lengths) if train.packing else max(lengths, default=2), 2)
    return [
        replace(
            train,
            max_seq_length=padded_width(min(longest, most), most),
            batch_size=max(min(train.batch_size, len(lengths)), 1),
        )
    ]
