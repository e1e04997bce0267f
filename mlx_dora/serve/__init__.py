"""Serving a model over HTTP: mlx-lm's server, with every request checked first."""

from mlx_dora.serve.paths import NotServedError, ServedPaths
from mlx_dora.serve.request import check_request

__all__ = ["NotServedError", "ServedPaths", "check_request"]
