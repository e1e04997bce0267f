"""Inspects and damages adapter folders."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def edit_config(folder: Path, **changes: Any) -> None:
    content = {**read_config(folder), **changes}
    (folder / "adapter_config.json").write_text(json.dumps(content))


def edit_tensors(folder: Path, **changes: mx.array | None) -> None:
    """Change tensors of a saved adapter; None deletes a tensor."""
    path = str(folder / "adapters.safetensors")
    tensors = mx.load(path)
    assert isinstance(tensors, dict)
    mx.eval(tensors)
    tensors |= changes  # pyright: ignore[reportOperatorIssue]
    mx.save_safetensors(path, {k: v for k, v in tensors.items() if v is not None})
