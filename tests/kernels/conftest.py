from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernels.device import Device, pretended


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    """A pretended GPU on which every kernel takes half of plain MLX's time."""
    with pretended(tmp_path / "cache", monkeypatch) as device:
        yield device
