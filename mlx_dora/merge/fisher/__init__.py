"""Fisher information of a model's matrices: estimates, saves and reads it."""

from mlx_dora.merge.fisher.config import FisherConfig

__all__ = ["FisherConfig"]
