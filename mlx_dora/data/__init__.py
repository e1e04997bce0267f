"""Training data: files of many formats to rows, targets and batches.

Training, evaluation and Fisher estimates read their data here.
"""

from mlx_dora.data.batches import Batch, batches_once, pack_batch, pad_batch
from mlx_dora.data.config import DataConfig
from mlx_dora.data.counts import RowCounts
from mlx_dora.data.dataset import Dataset, TokenDataset
from mlx_dora.data.loading import as_dataset, load_datasets
from mlx_dora.data.schedule import Schedule
from mlx_dora.data.targets import Example, target_spans

__all__ = [
    "Batch",
    "DataConfig",
    "Dataset",
    "Example",
    "RowCounts",
    "Schedule",
    "TokenDataset",
    "as_dataset",
    "batches_once",
    "load_datasets",
    "pack_batch",
    "pad_batch",
    "target_spans",
]
