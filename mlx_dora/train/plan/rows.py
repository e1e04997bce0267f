"""The lengths of the training rows, and the largest batches that they fill."""

from collections.abc import Sequence
from dataclasses import replace

from mlx_dora.adapters.hosting import load_tokenizer
from mlx_dora.data.batches import padded_width
from mlx_dora.data.counts import RowCounts
from mlx_dora.data.loading import load_datasets
from mlx_dora.data.widths import group_by_width
from mlx_dora.errors import DoRAError
from mlx_dora.train.config import TrainConfig


def row_lengths(train: TrainConfig) -> list[int]:
    """Tokens of each row of the training data that has a target.

    Raises:
        DoRAError: If there is no training data, or a row is malformed.
    """
    tokenizer = load_tokenizer(
        str(train.model), trust_remote_code=train.trust_remote_code
    )
    data = load_datasets(train, tokenizer, ["train"])["train"]
    if data is None:
        raise DoRAError(f"{train.data} has no train data.")
    counts = RowCounts()
    return [len(row[0]) for row in data if counts.add(row, train.max_seq_length)]


def largest_batches(
    train: TrainConfig, lengths: Sequence[int] | None
) -> list[TrainConfig]:
    """The settings with the batches that may need the most memory.

    Args:
        train: Settings of the training.
        lengths: Tokens of each row; None if every row has the maximum length.

    Returns:
        Settings without ``batch_tokens``, whose batches have ``batch_size`` rows of
        ``max_seq_length`` tokens: one, or with ``batch_tokens`` one for each width.

    Raises:
        DoRAError: If a row is longer than ``batch_tokens``.
    """
    most = train.max_seq_length
    if train.batch_tokens is not None:
        cut = [min(length, most) for length in lengths or [most]]
        if max(cut) > train.batch_tokens:
            raise DoRAError(
                f"batch_tokens {train.batch_tokens} holds no row of {max(cut)} tokens, "
                "the longest: raise it, or lower max_seq_length."
            )
        shapes = [(train.batch_tokens // most, most)]
        if lengths is not None:
            groups = group_by_width(cut, train.batch_tokens)
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
