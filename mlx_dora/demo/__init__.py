"""The demo: the complete workflow on a small real model and a small data set."""

from mlx_dora.demo.config import DemoConfig
from mlx_dora.demo.script import DemoReport, run_demo

__all__ = ["DemoConfig", "DemoReport", "run_demo"]
