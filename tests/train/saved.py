"""Reads the files that a training has written."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx


def tensors(folder: Path) -> dict[str, mx.array]:
    loaded = mx.load(str(folder / "adapters.safetensors"))
    assert isinstance(loaded, dict)
    return loaded


def same_bits(first: dict[str, mx.array], second: dict[str, mx.array]) -> bool:
    return first.keys() == second.keys() and all(
        mx.array_equal(value, second[name]).item() for name, value in first.items()
    )


def log(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())
