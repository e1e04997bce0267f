"""Fusing: an adapter's weights computed into a model, in memory or as a stream."""

from typing import TYPE_CHECKING

from mlx_dora.lazy import public_names

if TYPE_CHECKING:
    from mlx_dora.fuse.config import FuseConfig
    from mlx_dora.fuse.model import fuse_dora, fuse_model, save_fused
    from mlx_dora.fuse.report import FuseReport

_HOME = {
    "FuseConfig": "mlx_dora.fuse.config",
    "FuseReport": "mlx_dora.fuse.report",
    "fuse_dora": "mlx_dora.fuse.model",
    "fuse_model": "mlx_dora.fuse.model",
    "save_fused": "mlx_dora.fuse.model",
}

__all__ = ["FuseConfig", "FuseReport", "fuse_dora", "fuse_model", "save_fused"]

__getattr__, __dir__ = public_names(__name__, _HOME)
