"""Files and arrays: strict headers, streaming reads and atomic writes."""

from mlx_dora.io.atomic import atomic_directory, write_tensors, write_text
from mlx_dora.io.checkpoint import Checkpoint, ShardWriter
from mlx_dora.io.gate import read_tensors
from mlx_dora.io.header import read_header
from mlx_dora.io.stream import TensorStream

__all__ = [
    "Checkpoint",
    "ShardWriter",
    "TensorStream",
    "atomic_directory",
    "read_header",
    "read_tensors",
    "write_tensors",
    "write_text",
]
