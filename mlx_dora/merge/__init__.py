"""Merges adapters and models by magnitude and direction; extracts adapters."""

from mlx_dora.merge.adapters.merge import merge_adapters
from mlx_dora.merge.fisher.estimate import estimate_fisher
from mlx_dora.merge.models.merge import merge_models

__all__ = ["estimate_fisher", "merge_adapters", "merge_models"]
