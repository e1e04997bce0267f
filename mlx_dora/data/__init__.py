"""Training data: files of many formats to rows, targets and batches.

Training, evaluation and Fisher estimates read their data here.
"""

from typing import TYPE_CHECKING

from mlx_dora.lazy import public_names

if TYPE_CHECKING:
    from mlx_dora.data.batches import Batch, batches_once, pack_batch, pad_batch
    from mlx_dora.data.config import DataConfig
    from mlx_dora.data.counts import RowCounts
    from mlx_dora.data.dataset import Dataset, TokenDataset
    from mlx_dora.data.loading import as_dataset, load_datasets
    from mlx_dora.data.schedule import Schedule
    from mlx_dora.data.targets import Example, target_spans

_HOME = {
    "Batch": "mlx_dora.data.batches",
    "DataConfig": "mlx_dora.data.config",
    "Dataset": "mlx_dora.data.dataset",
    "Example": "mlx_dora.data.targets",
    "RowCounts": "mlx_dora.data.counts",
    "Schedule": "mlx_dora.data.schedule",
    "TokenDataset": "mlx_dora.data.dataset",
    "as_dataset": "mlx_dora.data.loading",
    "batches_once": "mlx_dora.data.batches",
    "load_datasets": "mlx_dora.data.loading",
    "pack_batch": "mlx_dora.data.batches",
    "pad_batch": "mlx_dora.data.batches",
    "target_spans": "mlx_dora.data.targets",
}

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

__getattr__, __dir__ = public_names(__name__, _HOME)
