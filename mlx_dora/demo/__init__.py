"""The demo: the complete workflow on a small real model and a small data set."""

from typing import TYPE_CHECKING

from mlx_dora.lazy import public_names

if TYPE_CHECKING:
    from mlx_dora.demo.config import DemoConfig
    from mlx_dora.demo.script import DemoReport, run_demo

_HOME = {
    "DemoConfig": "mlx_dora.demo.config",
    "DemoReport": "mlx_dora.demo.script",
    "run_demo": "mlx_dora.demo.script",
}

__all__ = ["DemoConfig", "DemoReport", "run_demo"]

__getattr__, __dir__ = public_names(__name__, _HOME)
