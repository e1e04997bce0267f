"""Module names: PEFT uses those of transformers, and we use those of mlx-lm."""

import logging
import re
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_dora.adapters.adapter import Adapter, take_adapter
from mlx_dora.adapters.config import DoRAConfig
from mlx_dora.adapters.surgery import remove_dora
from mlx_dora.errors import DoRAError
from mlx_dora.peft import from_peft, to_peft
from mlx_dora.peft.classes import DIFFERENT, SAME
from mlx_dora.peft.names import class_in_folder, class_of, names_of
from mlx_dora.peft.tensors import PEFT_TENSORS_NAME
from tests.adapters.folders import edit_config, read_config
from tests.adapters.training import perturb
from tests.compat.tiny_models import build, model_files

# Class, key, the module's path in MLX and in transformers.
PATHS = [
    ("gemma3", "self_attn.q_proj", "language_model.model.layers.3.self_attn.q_proj",
     "model.language_model.layers.3.self_attn.q_proj"),
    ("gpt_neox", "attention.query_key_value",
     "model.h.3.attention.query_key_value",
     "gpt_neox.layers.3.attention.query_key_value"),
    ("gpt2", "attn.c_attn", "model.h.3.attn.c_attn", "transformer.h.3.attn.c_attn"),
    ("exaone", "attn.attention.out_proj",
     "transformer.h.3.attn.attention.out_proj", "model.layers.3.self_attn.o_proj"),
    ("nemotron_h", "mixer.out_proj", "backbone.layers.0.mixer.out_proj",
     "model.layers.0.mixer.out_proj"),
    ("qwen3_5", "self_attn.v_proj", "language_model.model.layers.3.self_attn.v_proj",
     "model.layers.3.self_attn.v_proj"),
]  # fmt: skip


def adapter_of(model: nn.Module, *keys: str) -> Adapter:
    from mlx_dora.adapters.surgery import apply_dora

    apply_dora(model, DoRAConfig(rank=3, num_layers=-1, keys=keys))
    perturb(model)
    adapter = take_adapter(model)
    remove_dora(model)
    return adapter


def stored(folder: Path) -> set[str]:
    tensors = mx.load(str(folder / PEFT_TENSORS_NAME))
    assert isinstance(tensors, dict)
    return {name.partition(".lora_")[0] for name in tensors}


@pytest.mark.parametrize(("kind", "key", "ours", "theirs"), PATHS)
def test_report_18_and_19_names_are_those_of_transformers_both_ways(
    tmp_path: Path, kind: str, key: str, ours: str, theirs: str
) -> None:
    model = build(kind)
    adapter = adapter_of(model, key)
    assert ours in adapter.paths
    to_peft(adapter, tmp_path / "peft", model=model)
    assert f"base_model.model.{theirs}" in stored(tmp_path / "peft")
    config = read_config(tmp_path / "peft")
    assert theirs in config["target_modules"]
    assert config["fan_in_fan_out"] == (kind == "gpt2")
    edit_config(tmp_path / "peft", target_modules=[theirs.rpartition(".")[2]])
    for base in (None, model):
        again = from_peft(tmp_path / "peft", base)
        assert again.paths == adapter.paths
        assert all(mx.array_equal(again.tensors[n], v) for n, v in adapter.tensors.items())  # fmt: skip  # noqa: E501


def test_ranks_of_modules_are_written_under_transformers_names(tmp_path: Path) -> None:
    model = build("gpt2")
    adapter = adapter_of(model, "attn.c_attn", "mlp.c_fc")
    wide = "model.h.3.mlp.c_fc"
    adapter.tensors[f"{wide}.lora_a"] = mx.ones((64, 5))
    adapter.tensors[f"{wide}.lora_b"] = mx.ones((5, 256))
    ranks = {path: 5 if path == wide else 3 for path in adapter.paths}
    config = DoRAConfig(rank=5, scale=2.0, keys=tuple(ranks), rank_pattern=ranks)
    adapter = Adapter(config=config, tensors=adapter.tensors)
    to_peft(adapter, tmp_path / "peft", model=model)
    pattern = read_config(tmp_path / "peft")["rank_pattern"]
    assert pattern["transformer.h.3.mlp.c_fc"] == 5
    assert pattern["transformer.h.3.attn.c_attn"] == 3
    assert from_peft(tmp_path / "peft").config == config


def test_the_recorded_base_determines_the_class(tmp_path: Path) -> None:
    adapter = adapter_of(build("gpt_neox"), "attention.dense")
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text('{"model_type": "gpt_neox"}')
    to_peft(adapter, tmp_path / "peft", model=tmp_path / "base")
    first = "base_model.model.gpt_neox.layers.0.attention.dense"
    assert first in stored(tmp_path / "peft")
    (tmp_path / "base" / "config.json").write_text('{"model_type": "mistral"}')
    assert class_in_folder(tmp_path / "base") == "llama"  # as mlx-lm loads it
    assert class_in_folder(tmp_path / "none") is None


@pytest.mark.parametrize("kind", ["internlm2", None])
def test_unknown_names_are_written_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str | None
) -> None:
    model = build("gpt2" if kind is None else kind)
    key = "attn.c_attn" if kind is None else "attention.wo"
    adapter = adapter_of(model, key)
    with caplog.at_level(logging.WARNING, logger="mlx_dora"):
        to_peft(adapter, tmp_path / "peft", model=None if kind is None else model)
    reason = "give the model" if kind is None else "names for the class internlm2"
    assert reason in caplog.text
    assert adapter.paths[0] in caplog.text
    assert f"base_model.model.{adapter.paths[0]}" in stored(tmp_path / "peft")


def test_names_read_without_a_model_are_kept_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = build("gpt_neox")
    adapter = adapter_of(model, "attention.dense")
    to_peft(adapter, tmp_path / "peft", model=model)
    path = str(tmp_path / "peft" / PEFT_TENSORS_NAME)
    tensors = mx.load(path)
    assert isinstance(tensors, dict)
    mx.eval(tensors)
    with caplog.at_level(logging.WARNING, logger="mlx_dora"):
        assert from_peft(tmp_path / "peft").paths == adapter.paths
        assert caplog.text == ""  # our own metadata restores the names
        mx.save_safetensors(path, tensors)
        loaded = from_peft(tmp_path / "peft")
    assert loaded.paths[0] == "gpt_neox.layers.0.attention.dense"
    assert "without a model" in caplog.text


def test_plain_names_need_no_model(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="mlx_dora"):
        to_peft(adapter_of(build("llama"), "self_attn.q_proj"), tmp_path / "peft")
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("kind", "key", "message"),
    [
        (
            "mixtral",
            "block_sparse_moe.gate",
            r"no linear layer .* model\.layers\.0\.bl",
        ),
        ("qwen3_moe", "mlp.gate", r"no linear layer .* model\.layers\.0\.mlp\.gate"),
        ("falcon_h1", "self_attn.q_proj", "falcon_h1 do not convert .*multipliers"),
    ],
)
def test_modules_missing_in_transformers_are_refused(
    tmp_path: Path, kind: str, key: str, message: str
) -> None:
    model = build(kind)
    with pytest.raises(DoRAError, match=message):
        to_peft(adapter_of(model, key), tmp_path / "peft", model=model)
    assert not (tmp_path / "peft").exists()


@pytest.mark.parametrize(
    ("kind", "key", "path"),
    [
        ("deepseek_v2", "mlp.down_proj", r"model\.layers\.0\.mlp\.down_proj"),
        ("mamba", "mixer.out_proj", r"backbone\.layers\.0\.mixer\.out_proj"),
    ],
)
def test_modules_that_peft_refuses_are_named(
    tmp_path: Path, kind: str, key: str, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = build(kind)
    with caplog.at_level("WARNING"):
        to_peft(adapter_of(model, key), tmp_path / "peft", model=model)
    assert re.search(
        rf"PEFT 0\.21 cannot load adapters of {kind} for: {path}", caplog.text
    )


def test_an_adapter_of_weights_that_mlx_lm_scales_is_refused(tmp_path: Path) -> None:
    model = build("falcon_h1")
    to_peft(adapter_of(model, "self_attn.q_proj"), tmp_path / "peft")
    with pytest.raises(DoRAError, match=r"falcon_h1 do not convert .*multipliers"):
        from_peft(tmp_path / "peft", model)


def test_the_table_lists_each_class_of_mlx_lm_once() -> None:
    classes = {name for name, is_model in model_files().items() if is_model}
    assert classes >= SAME | DIFFERENT.keys()
    assert not SAME & DIFFERENT.keys()
    assert class_of(build("llama")) == "llama"
    assert class_of(nn.Linear(2, 2)) is None
    assert names_of("llama") is not None
    assert names_of("no such class") is None


@pytest.mark.parametrize("kind", sorted(DIFFERENT))
def test_each_name_has_one_inverse(kind: str) -> None:
    names = DIFFERENT[kind]
    starts = names.starts or (("model.layers", "model.layers"),)
    for ours, theirs in starts:
        for end, their_end in names.ends or (("q", "q"),):
            path = f"{ours}.0.{end}"
            assert names.to_transformers(path) == f"{theirs}.0.{their_end}"
            assert names.to_mlx(f"{theirs}.0.{their_end}") == path


def test_an_unknown_name_gets_a_similar_name_as_hint(tmp_path: Path) -> None:
    model = build("gpt_neox")
    to_peft(adapter_of(model, "attention.dense"), tmp_path / "peft", model=model)
    path = str(tmp_path / "peft" / PEFT_TENSORS_NAME)
    tensors = mx.load(path)
    assert isinstance(tensors, dict)
    mx.eval(tensors)
    renamed = {k.replace("dense", "dence"): v for k, v in tensors.items()}
    mx.save_safetensors(path, renamed)
    edit_config(tmp_path / "peft", target_modules=None)
    with pytest.raises(
        DoRAError, match=r"did you mean gpt_neox\.layers\.\d\.attention"
    ):
        from_peft(tmp_path / "peft", model)
