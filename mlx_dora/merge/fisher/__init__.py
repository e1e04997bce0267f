"""Fisher information of a model's matrices: how it is estimated, kept and read."""

from mlx_dora.merge.fisher.config import FisherConfig

__all__ = ["FisherConfig"]
