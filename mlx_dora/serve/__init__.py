"""Serves a model over HTTP with mlx-lm's server, checking every request first."""

from mlx_dora.serve.paths import NotServedError, ServedPaths
from mlx_dora.serve.request import check_request

__all__ = ["NotServedError", "ServedPaths", "check_request"]
