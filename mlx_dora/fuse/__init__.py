"""Fusing: an adapter's weights computed into a model, in memory or as a stream."""

from mlx_dora.fuse.config import FuseConfig
from mlx_dora.fuse.model import fuse_dora, fuse_model, save_fused
from mlx_dora.fuse.report import FuseReport

__all__ = ["FuseConfig", "FuseReport", "fuse_dora", "fuse_model", "save_fused"]
