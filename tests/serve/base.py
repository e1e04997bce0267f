"""The random base model of the server's tests."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from tests.conftest import TINY_CONFIG, write_tiny_tokenizer


def write_tiny_base(base: Path) -> None:
    """Write a two-layer Llama with its tokenizer to a new folder."""
    from mlx_lm.models import llama

    base.mkdir()
    mx.random.seed(0)
    model: Any = llama.Model(llama.ModelArgs.from_dict(TINY_CONFIG))
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(base / "model.safetensors"), weights, {"format": "mlx"})
    (base / "config.json").write_text(json.dumps(TINY_CONFIG))
    write_tiny_tokenizer(base)
