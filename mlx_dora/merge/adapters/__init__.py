"""Merges adapters into one adapter; extracts an adapter from two models."""

from mlx_dora.merge.adapters.extract import extract_adapter
from mlx_dora.merge.adapters.merge import merge_adapters, merge_adapters_report

__all__ = ["extract_adapter", "merge_adapters", "merge_adapters_report"]
