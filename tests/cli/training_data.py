"""A tiny data set on disk for the tests of commands."""

import json
from pathlib import Path


def write_data(folder: Path, **sizes: int) -> Path:
    """Write completions with two labels: ``write_data(path, train=20, valid=4)``."""
    folder.mkdir(exist_ok=True)
    for name, size in sizes.items():
        rows = [
            {"prompt": f"What is {i}?", "completion": ("even", "odd")[i % 2]}
            for i in range(size)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text)
    return folder
