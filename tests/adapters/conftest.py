from pathlib import Path

import mlx.nn as nn
import pytest

from mlx_dora.adapters.files import save_adapter
from tests.adapters.training import train


@pytest.fixture
def saved(tiny_model: nn.Module, tmp_path: Path) -> Path:
    """Return the folder of an adapter of `tiny_model`."""
    train(tiny_model)
    save_adapter(tiny_model, tmp_path / "adapter", base_model="some/model")
    return tmp_path / "adapter"
