"""What a training left on disk."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx


def tensors(folder: Path) -> dict[str, mx.array]:
    loaded = mx.load(str(folder / "adapters.safetensors"))
    assert isinstance(loaded, dict)
    return loaded


def same_bits(one: dict[str, mx.array], two: dict[str, mx.array]) -> bool:
    return one.keys() == two.keys() and all(
        mx.array_equal(value, two[name]).item() for name, value in one.items()
    )


def log(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())
