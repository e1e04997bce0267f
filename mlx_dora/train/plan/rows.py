"""The lengths of the training rows, and the largest batch that they fill."""

from collections.abc import Sequence
from dataclasses import replace

from mlx_dora.adapters.hosting import load_tokenizer
from mlx_dora.data.batches import padded_width
from mlx_dora.data.counts import RowCounts
from mlx_dora.data.loading import load_datasets
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


def for_rows(train: TrainConfig, lengths: Sequence[int]) -> TrainConfig:
    """The settings with the batch that these rows fill: its rows, and its width."""
    most = train.max_seq_length
    longest = max(sum(lengths) if train.packing else max(lengths, default=2), 2)
    return replace(
        train,
        max_seq_length=padded_width(min(longest, most), most),
        batch_size=max(min(train.batch_size, len(lengths)), 1),
    )
