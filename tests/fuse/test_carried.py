"""A fuse copies the tensors of a checkpoint that mlx-lm's text model drops."""

import json
import logging
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx_lm
import pytest
from mlx.utils import tree_flatten

from mlx_dora.adapters.config import DoRAConfig
from mlx_dora.adapters.files import save_adapter
from mlx_dora.adapters.hosting import load, load_with_config
from mlx_dora.fuse.config import FuseConfig
from mlx_dora.fuse.model import fuse_dora, fuse_model, save_fused
from mlx_dora.io.checkpoint import Checkpoint
from tests.adapters.training import TOKENS, train
from tests.checks import assert_close, to_numpy
from tests.conftest import write_tiny_tokenizer

TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 320,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
}
GEMMA3 = {
    "model_type": "gemma3",
    "vocab_size": 320,
    "text_config": {
        **TEXT,
        "model_type": "gemma3_text",
        "rope_local_base_freq": 10000.0,
        "sliding_window": 64,
        "sliding_window_pattern": 2,
        "query_pre_attn_scalar": 8,
    },
}
QWEN3_VL = {
    "model_type": "qwen3_vl",
    "text_config": {**TEXT, "model_type": "qwen3_vl_text", "tie_word_embeddings": True},
}
MISTRAL3 = {
    "model_type": "mistral3",
    "text_config": {**TEXT, "model_type": "mistral", "tie_word_embeddings": False},
}
VISION = {"vision_config": {"model_type": "siglip_vision_model", "hidden_size": 16}}
TOWER = {
    GEMMA3["model_type"]: ("vision_tower.layers.0.q_proj", "multi_modal_projector.up"),
    MISTRAL3["model_type"]: ("vision_tower.a.q_proj", "multi_modal_projector.linear_1"),
    QWEN3_VL["model_type"]: ("visual.blocks.0.qkv", "visual.merger.mlp"),
}
KEYS = ("self_attn.q_proj", "mlp.up_proj")


def write_model(
    folder: Path, config: dict[str, Any], extra: dict[str, mx.array]
) -> Path:
    """Write a random model of an mlx-lm class, with tensors that the class drops."""
    module = import_module(f"mlx_lm.models.{config['model_type']}")
    model = module.Model(module.ModelArgs.from_dict(config))
    mx.random.seed(0)
    weights = {
        name: 0.1 * mx.random.normal(value.shape) if value.ndim > 1 else value
        for name, value in cast(
            list[tuple[str, mx.array]], tree_flatten(model.parameters())
        )
    }
    folder.mkdir()
    mx.save_safetensors(str(folder / "model.safetensors"), weights | extra)
    (folder / "config.json").write_text(json.dumps(config))
    write_tiny_tokenizer(folder)
    return folder


def tower(kind: str) -> dict[str, mx.array]:
    mx.random.seed(9)
    return {f"{name}.weight": mx.random.normal((16, 32)) for name in TOWER[kind]}


def adapt(base: Path, adapter: Path, config: DoRAConfig | None = None) -> mx.array:
    model, _ = load(base)
    logits = train(model, config or DoRAConfig(rank=2, num_layers=2, keys=KEYS))
    save_adapter(model, adapter)
    return logits


@pytest.mark.parametrize(
    "config", [GEMMA3, MISTRAL3, QWEN3_VL], ids=lambda config: config["model_type"]
)
def test_vision_tower_is_copied__mtplx_263__mlx_lm_89(
    tmp_path: Path, config: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    extra = tower(config["model_type"])
    base = write_model(tmp_path / "base", {**config, **VISION}, extra)
    expected = adapt(base, tmp_path / "a")
    with caplog.at_level(logging.WARNING, logger="mlx_dora"):
        fuse_model(base, tmp_path / "a", tmp_path / "fused")
    assert "left out" not in caplog.text
    fused = Checkpoint(tmp_path / "fused")
    for name, value in extra.items():
        assert mx.array_equal(fused.tensor(name), value)
    content = json.loads((tmp_path / "fused" / "config.json").read_text())
    assert content["vision_config"] == VISION["vision_config"]
    stock = mlx_lm.load(str(tmp_path / "fused"))[0]
    assert_close(stock(TOKENS), to_numpy(expected))


def test_fuse_in_memory_copies_them_too(tmp_path: Path) -> None:
    extra = tower("gemma3")
    base = write_model(tmp_path / "base", {**GEMMA3, **VISION}, extra)
    adapt(base, tmp_path / "a")
    model, tokenizer, config = load_with_config(base, tmp_path / "a")
    fuse_dora(model)
    save_fused(model, tokenizer, base, tmp_path / "fused", config=config)
    fused = Checkpoint(tmp_path / "fused")
    assert all(mx.array_equal(fused.tensor(n), v) for n, v in extra.items())
    assert "vision_config" in json.loads((tmp_path / "fused/config.json").read_text())


def test_packed_tower_becomes_dense_with_the_model(tmp_path: Path) -> None:
    dense = tower("gemma3")
    extra: dict[str, mx.array] = {}
    for name, value in dense.items():
        path = name.removesuffix(".weight")
        parts = mx.quantize(value, group_size=32, bits=8)
        extra |= {
            f"{path}.{leaf}": part
            for leaf, part in zip(("weight", "scales", "biases"), parts, strict=True)
        }
    quantization = {"group_size": 32, "bits": 8}
    config = {**GEMMA3, **VISION, "quantization": quantization}
    base = write_model(tmp_path / "base", config, extra)
    adapt(base, tmp_path / "a")
    settings = FuseConfig(mode="dequantize")
    fuse_model(base, tmp_path / "a", tmp_path / "fused", config=settings)
    fused = Checkpoint(tmp_path / "fused")
    assert not [name for name in fused.names if name.endswith((".scales", ".biases"))]
    for name, value in dense.items():
        assert_close(fused.tensor(name), to_numpy(value), bound=0.01)  # 8 bits
        path = name.removesuffix(".weight")
        unpacked = mx.dequantize(
            extra[name], extra[f"{path}.scales"], extra[f"{path}.biases"], 32, 8
        )
        assert mx.array_equal(fused.tensor(name), unpacked)


def test_stacked_experts_are_not_treated_as_dropped(tmp_path: Path) -> None:
    config = {
        "model_type": "qwen3_moe", **TEXT, "num_experts": 4, "num_experts_per_tok": 2,
        "decoder_sparse_step": 1, "mlp_only_layers": [], "moe_intermediate_size": 32,
        "norm_topk_prob": True, "tie_word_embeddings": True,
    }  # fmt: skip
    base = write_model(tmp_path / "base", config, {})
    path = base / "model.safetensors"
    apart: dict[str, mx.array] = {}
    for name, value in mx.load(str(path)).items():  # pyright: ignore[reportAttributeAccessIssue]
        if "switch_mlp" not in name:
            apart[name] = value
            continue
        for i in range(4):
            apart[name.replace("switch_mlp", f"experts.{i}")] = value[i]
    mx.eval(apart)
    mx.save_safetensors(str(path), apart)
    keys = DoRAConfig(rank=2, num_layers=2, keys=KEYS[:1])
    expected = adapt(base, tmp_path / "a", keys)
    fuse_model(base, tmp_path / "a", tmp_path / "fused")
    names = Checkpoint(tmp_path / "fused").names
    assert "model.layers.0.mlp.switch_mlp.up_proj.weight" in names
    assert not [name for name in names if ".experts." in name]
    stock = mlx_lm.load(str(tmp_path / "fused"))[0]
    assert_close(stock(TOKENS), to_numpy(expected))


def test_tower_nested_under_model_is_copied_under_its_earlier_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = write_model(tmp_path / "base", {**QWEN3_VL, **VISION}, {})
    path = str(base / "model.safetensors")
    nested = {
        name.replace("language_model.model.", "model.language_model."): value
        for name, value in mx.load(path).items()  # pyright: ignore[reportAttributeAccessIssue]
    }
    nested["model.visual.blocks.0.qkv.weight"] = mx.arange(8.0)
    mx.eval(nested)
    mx.save_safetensors(path, nested)
    expected = adapt(base, tmp_path / "a")
    with caplog.at_level(logging.WARNING, logger="mlx_dora"):
        fuse_model(base, tmp_path / "a", tmp_path / "fused")
    assert "1 tensors of the base are copied without their leading 'model.'" in (
        caplog.text
    )
    fused = Checkpoint(tmp_path / "fused")
    assert mx.array_equal(fused.tensor("visual.blocks.0.qkv.weight"), mx.arange(8.0))
    stock = mlx_lm.load(str(tmp_path / "fused"))[0]
    assert_close(stock(TOKENS), to_numpy(expected))


def test_copy_of_a_tied_head_is_dropped(tmp_path: Path) -> None:
    config = {"model_type": "llama", **TEXT, "tie_word_embeddings": True}
    buffer = "model.layers.0.self_attn.rotary_emb.inv_freq"
    extra = {"lm_head.weight": mx.ones((320, 32)), buffer: mx.ones(4)}
    base = write_model(tmp_path / "base", config, extra)
    adapt(base, tmp_path / "a")
    fuse_model(base, tmp_path / "a", tmp_path / "fused")
    names = Checkpoint(tmp_path / "fused").names
    assert "lm_head.weight" not in names
    assert buffer in names


def test_tensors_that_would_change_the_model_are_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some models' sanitize adds 1 to every norm if prediction heads are present."""
    from mlx_lm.models import llama

    def sanitize(self: object, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        kept = {k: v for k, v in weights.items() if "mtp." not in k and k[:2] != "v."}
        if len([k for k in weights if "mtp." in k]):
            kept |= {k: v + 1 for k, v in kept.items() if "norm" in k}
        return kept

    monkeypatch.setattr(llama.Model, "sanitize", sanitize)
    config = {"model_type": "llama", **TEXT, "tie_word_embeddings": True}
    extra = {"mtp.fc.weight": mx.ones((4, 4)), "v.a.weight": mx.ones((4, 4))}
    base = write_model(tmp_path / "base", {**config, **VISION}, extra)
    expected = adapt(base, tmp_path / "a")
    with caplog.at_level(logging.WARNING, logger="mlx_dora"):
        fuse_model(base, tmp_path / "a", tmp_path / "fused")
    assert "could not load it with them: 1 tensors of the base (mtp.fc.w" in caplog.text
    names = Checkpoint(tmp_path / "fused").names
    assert "mtp.fc.weight" not in names
    assert "v.a.weight" in names
    assert_close(mlx_lm.load(str(tmp_path / "fused"))[0](TOKENS), to_numpy(expected))


def test_files_of_processors_are_copied(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", {**GEMMA3, **VISION}, tower("gemma3"))
    travelling = {
        "preprocessor_config.json": '{"size": 28}',
        "processor_config.json": "{}",
        "chat_template.json": '{"chat_template": "x"}',
        "tokenizer.model": "bytes",
        "LICENSE": "Be kind.",
    }
    staying = {"hf_quant_config.json": "{}", "README.md": "of the base", "x.bin": "x"}
    for name, text in (travelling | staying).items():
        (base / name).write_text(text)
    adapt(base, tmp_path / "a")
    fuse_model(base, tmp_path / "a", tmp_path / "fused")
    for name, text in travelling.items():
        assert (tmp_path / "fused" / name).read_text() == text
    assert not [name for name in staying if (tmp_path / "fused" / name).exists()]
