"""Merges whole models, one tensor at a time; reads mergekit's configurations."""

from mlx_dora.merge.models.merge import merge_models, run_merge
from mlx_dora.merge.models.mergekit import read_mergekit
from mlx_dora.merge.models.plan import plan_models

__all__ = ["merge_models", "plan_models", "read_mergekit", "run_merge"]
