"""Rows that are cut at their start instead of their end."""

import logging

from mlx_dora.data.dataset import RowDataset
from mlx_dora.data.targets import Example, target_spans

logger = logging.getLogger(__name__)


class KeptEnds(RowDataset):
    """A data set of which long rows keep their last tokens.

    Args:
        data: The data set.
        max_seq_length: Number of tokens to keep.
    """

    def __init__(self, data: RowDataset, max_seq_length: int) -> None:
        self.data = data
        self.serves = data.serves
        self._most = max_seq_length
        lengths = [len(data[index][0]) for index in range(len(data))]
        self.cut = sum(length > max_seq_length for length in lengths)
        if self.cut:
            logger.warning(
                "%d of %d rows are longer than max_seq_length %d and were cut at their "
                "start (longest: %d tokens)",
                self.cut,
                len(lengths),
                max_seq_length,
                max(lengths),
            )

    @property
    def reading(self) -> str:
        """How the rows of the data set are read."""
        return self.data.reading

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Example:
        tokens, targets = self.data[index]
        gone = max(len(tokens) - self._most, 0)
        if isinstance(targets, int):
            return tokens[gone:], max(targets - gone, 0)
        spans = target_spans(targets, len(tokens))
        kept = ((max(start - gone, 0), end - gone) for start, end in spans)
        return tokens[gone:], tuple((start, end) for start, end in kept if end > 0)

    def where(self, index: int) -> str:
        """Name an example, as the data set does."""
        return self.data.where(index)

    def label(self, index: int) -> bool:
        """Whether an answer is desirable, as the data set says."""
        return self.data.label(index)  # pyright: ignore[reportAttributeAccessIssue] - of a data set with labels
