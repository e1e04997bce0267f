"""Files and arrays: strict headers, streaming reads and atomic writes."""

from typing import TYPE_CHECKING

from mlx_dora.lazy import public_names

if TYPE_CHECKING:
    from mlx_dora.io.atomic import atomic_directory, write_tensors, write_text
    from mlx_dora.io.checkpoint import Checkpoint, ShardWriter
    from mlx_dora.io.gate import read_tensors
    from mlx_dora.io.header import read_header
    from mlx_dora.io.stream import TensorStream

_HOME = {
    "Checkpoint": "mlx_dora.io.checkpoint",
    "ShardWriter": "mlx_dora.io.checkpoint",
    "TensorStream": "mlx_dora.io.stream",
    "atomic_directory": "mlx_dora.io.atomic",
    "read_header": "mlx_dora.io.header",
    "read_tensors": "mlx_dora.io.gate",
    "write_tensors": "mlx_dora.io.atomic",
    "write_text": "mlx_dora.io.atomic",
}

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

__getattr__, __dir__ = public_names(__name__, _HOME)
