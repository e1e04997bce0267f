"""The methods of merging: their table, and what they do to plain tensors."""

from mlx_dora.merge.methods.method import Mergekit, MergeMethod
from mlx_dora.merge.methods.table import DEFAULT, MERGEKIT, METHODS, method_named

__all__ = ["DEFAULT", "MERGEKIT", "METHODS", "MergeMethod", "Mergekit", "method_named"]
