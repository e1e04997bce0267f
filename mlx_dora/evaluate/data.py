"""Data sets under the name that they had before `mlx_dora.data`."""

from mlx_dora.data.dataset import Dataset, JoinedDataset, TokenDataset
from mlx_dora.data.loading import as_dataset, load_datasets, make_datasets
from mlx_dora.data.targets import Example, target_spans

__all__ = [
    "Dataset",
    "Example",
    "JoinedDataset",
    "TokenDataset",
    "as_dataset",
    "load_datasets",
    "make_datasets",
    "target_spans",
]
