"""No path of this machine stays in a config that is uploaded."""

import json
from pathlib import Path
from typing import Any

import pytest

from mlx_dora.errors import DoRAError
from mlx_dora.publish.local_paths import public_config


def written(folder: Path, content: Any, name: str = "config.json") -> Path:
    path = folder / name
    path.write_text(json.dumps(content))
    return path


def test_paths_become_null_or_a_hub_id(tmp_path: Path) -> None:
    cached = "/home/u/.cache/huggingface/hub/models--org--lm/snapshots/1a2b"
    content = {
        "_name_or_path": "/home/u/models/lm",
        "text_config": {"_name_or_path": "~/lm", "hidden_size": 64},
        "mlx_dora": {"base": {"model": cached, "fingerprint": "sha256:0"}},
        "data": ["/home/u/rows", "org/rows"],
    }
    text, replaced = public_config(written(tmp_path, content))
    assert text is not None
    assert json.loads(text) == {
        "_name_or_path": None,
        "text_config": {"_name_or_path": None, "hidden_size": 64},
        "mlx_dora": {"base": {"model": "org/lm", "fingerprint": "sha256:0"}},
        "data": [None, "org/rows"],
    }
    assert replaced == ["/home/u/models/lm", "~/lm", cached, "/home/u/rows"]


@pytest.mark.parametrize(
    "content",
    [
        {"model": "org/name", "model_type": "llama", "mlx_dora": {"base": None}},
        {"model": ".."},  # an adapter in the folder of its base
        {"chat_template": "/home/{{ role }}/x", "eos_token": "/", "pad_token": "~"},
    ],
)
def test_other_values_stay_byte_for_byte(tmp_path: Path, content: dict) -> None:
    assert public_config(written(tmp_path, content)) == (None, [])


def test_other_files_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text("{")
    assert public_config(path) == (None, [])
    damaged = tmp_path / "config.json"
    damaged.write_text("[1]")
    with pytest.raises(DoRAError, match=r"config\.json"):
        public_config(damaged)
