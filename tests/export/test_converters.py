"""Our GGUF against llama.cpp's own converters, for every class of the table.

``MLX_DORA_LLAMA_SOURCE`` names the folder of llama.cpp's source that has them, for
example ``vendor/llama.cpp`` in the source distribution of llama-cpp-python, and
``MLX_DORA_LLAMA_PYTHON`` an interpreter with torch, transformers and gguf.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_dora.adapters.adapter import take_adapter
from mlx_dora.adapters.config import DoRAConfig
from mlx_dora.adapters.files import save_adapter
from mlx_dora.adapters.hosting import load
from mlx_dora.adapters.surgery import apply_layers
from mlx_dora.export import fused_to_gguf
from mlx_dora.export.architectures import ARCHITECTURES
from mlx_dora.export.gguf_adapter import check_gguf, gguf_tensors, head_counts
from mlx_dora.fuse.model import fuse_model
from mlx_dora.peft import to_peft
from tests.adapters.training import QV, perturb, train
from tests.compat.tiny_models import build
from tests.hosts import ran, version_in

pytestmark = pytest.mark.slow
gguf = pytest.importorskip("gguf")

SIZES = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "vocab_size": 64, "max_position_embeddings": 128, "pad_token_id": 0,
}  # fmt: skip
CLASSES = {
    "cohere2": "Cohere2ForCausalLM", "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM", "gemma3_text": "Gemma3ForCausalLM",
    "granite": "GraniteForCausalLM", "llama": "LlamaForCausalLM",
    "olmo2": "Olmo2ForCausalLM", "phi3": "Phi3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM", "starcoder2": "Starcoder2ForCausalLM",
}  # fmt: skip


def test_every_class_is_compared() -> None:
    assert CLASSES.keys() == ARCHITECTURES.keys()


@pytest.fixture(scope="module")
def source() -> Path:
    folder = os.environ.get("MLX_DORA_LLAMA_SOURCE")
    if not folder or not (Path(folder) / "convert_lora_to_gguf.py").is_file():
        pytest.skip("MLX_DORA_LLAMA_SOURCE does not name llama.cpp's source")
    return Path(folder)


def python() -> str:
    return os.environ.get("MLX_DORA_LLAMA_PYTHON", sys.executable)


def run(*args: object) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [python(), *map(str, args)],
        capture_output=True, text=True, timeout=300, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {t.name: np.array(t.data) for t in reader.tensors}


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_adapter_is_that_of_llama_cpps_converter(
    kind: str, source: Path, tmp_path: Path
) -> None:
    config = {"model_type": kind, "architectures": [CLASSES[kind]], **SIZES}
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps(config))
    model = build(kind)
    mx.random.seed(1)
    apply_layers(model, DoRAConfig(num_layers=-1, rank=3, scale=2.0), "lora")
    perturb(model)
    adapter = take_adapter(model)
    to_peft(adapter, tmp_path / "peft", model=base)
    run(
        source / "convert_lora_to_gguf.py", "--base", base, "--outtype", "f32",
        "--outfile", tmp_path / "theirs.gguf", tmp_path / "peft",
    )  # fmt: skip
    fields, theirs = read(tmp_path / "theirs.gguf")
    assert fields["general.architecture"] == ARCHITECTURES[kind].name
    heads = head_counts(config) if ARCHITECTURES[kind].pairs else {}
    ours = gguf_tensors(adapter, check_gguf(adapter, base), heads)
    assert ours.keys() == theirs.keys()
    alpha = adapter.config.scale * adapter.config.rank
    assert fields["adapter.lora.alpha"] == pytest.approx(alpha)
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, rtol=1e-5, atol=1e-8)
    ran(
        "llama.cpp",
        f"adapters of {len(ARCHITECTURES)} classes equal to those of its converter",
        version=version_in(python(), "llama_cpp_python"),
    )


@pytest.mark.real_model
def test_fused_model_is_exported_by_llama_cpps_converter(
    smollm: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = load(smollm)
    train(model, DoRAConfig(num_layers=1, keys=QV))
    save_adapter(model, tmp_path / "adapter")
    del model
    fuse_model(smollm, tmp_path / "adapter", tmp_path / "fused")
    monkeypatch.setenv("LLAMA_CPP", str(source))
    monkeypatch.setattr(sys, "executable", python())
    done = fused_to_gguf(tmp_path / "fused", outtype="f32")
    assert done.path is not None and done.has_template
    fields, tensors = read(done.path)
    assert fields["general.architecture"] == "llama"
    fused: Any
    fused, _ = load(tmp_path / "fused")
    weights = dict(tree_flatten(fused.parameters()))
    value = np.array(weights["model.layers.29.self_attn.v_proj.weight"])
    np.testing.assert_array_equal(tensors["blk.29.attn_v.weight"], value)
