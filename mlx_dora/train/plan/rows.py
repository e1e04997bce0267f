"""The sizes of the training rows, and the largest batches that they fill."""

from dataclasses import replace
from itertools import islice

from mlx_dora.adapters.hosting import load_tokenizer
from mlx_dora.data.batches import padded_width
from mlx_dora.data.counts import RowSizes, measure_rows
from mlx_dora.data.loading import load_datasets
from mlx_dora.data.widths import group_by_width
from mlx_dora.errors import DoRAError
from mlx_dora.train.config import TrainConfig
from mlx_dora.train.objectives.objective import Objective

Step = tuple[TrainConfig, float]
"""Settings whose batches have ``batch_size`` rows of ``max_seq_length`` tokens, and the
largest share of a batch's positions that are targets."""


def row_sizes(train: TrainConfig, objective: Objective) -> RowSizes:
    """Sizes of the rows, or units, of the training data that have targets.

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
    sizes = measure_rows(data, objective.unit or 1, train.max_seq_length)
    return sizes.lengthened(objective.added_tokens)


def largest_batches(
    train: TrainConfig, sizes: RowSizes | None, rows_per_unit: int = 1
) -> list[Step]:
    """The steps that may need the most memory.

    Args:
        train: Settings of the training.
        sizes: Sizes of the rows; None if every row has the maximum length.
        rows_per_unit: Rows of the batches for each of `sizes`.

    Returns:
        One step, or with ``batch_tokens`` one for each width, none of which sets it.

    Raises:
        DoRAError: If a row is longer than ``batch_tokens``.
    """
    most = train.max_seq_length
    if train.batch_tokens is not None:
        cut = [min(length, most) for length in (sizes.lengths if sizes else [most])]
        room = train.batch_tokens // rows_per_unit
        if max(cut) > room:
            pair = f" / {rows_per_unit} rows a pair" if rows_per_unit > 1 else ""
            raise DoRAError(
                f"batch_tokens {train.batch_tokens}{pair} holds no row of {max(cut)} "
                "tokens, the longest: raise it, or lower max_seq_length."
            )
        shapes = [(room // most, most)]
        if sizes is not None:
            groups = group_by_width(cut, room)
            shapes = [(max(group.sizes), group.width) for group in groups]
        train = replace(train, batch_tokens=None)
        return [_step(train, sizes, rows, width) for rows, width in shapes]
    if sizes is None:
        return [(train, 1.0)]
    lengths = sizes.lengths
    longest = max(sum(lengths) if train.packing else max(lengths, default=2), 2)
    rows = max(min(train.batch_size, len(lengths)), 1)
    return [_step(train, sizes, rows, padded_width(min(longest, most), most))]


def _step(train: TrainConfig, sizes: RowSizes | None, rows: int, width: int) -> Step:
    """The step whose batch has the most targets that rows up to a width can have."""
    share = 1.0
    if sizes is not None and not train.packing:
        pairs = zip(sizes.lengths, sizes.targets, strict=True)
        is_cut = width == train.max_seq_length
        fitting = (count for length, count in pairs if length <= width or is_cut)
        targets = sum(islice(sorted(fitting, reverse=True), rows))
        share = min(targets / (rows * sizes.unit * (width - 1)), 1.0)
    return replace(train, batch_size=rows, max_seq_length=width), share
