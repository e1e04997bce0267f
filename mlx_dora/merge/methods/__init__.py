"""Merge methods: their table, and their implementation on plain tensors."""

from mlx_dora.merge.methods.method import Mergekit, MergeMethod
from mlx_dora.merge.methods.table import DEFAULT, MERGEKIT, METHODS, method_named

__all__ = ["DEFAULT", "MERGEKIT", "METHODS", "MergeMethod", "Mergekit", "method_named"]
