"""The GGUF files and Modelfiles, by the package gguf and by short conversations."""

import json
import stat
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner

from mlx_dora.adapters.adapter import Adapter, take_adapter
from mlx_dora.adapters.config import DoRAConfig
from mlx_dora.adapters.files import save_adapter
from mlx_dora.adapters.hosting import load, load_tokenizer
from mlx_dora.cli.convert import command as convert
from mlx_dora.cli.fuse import command as fuse
from mlx_dora.errors import DoRAError
from mlx_dora.export import fused_to_gguf, to_gguf
from mlx_dora.export.architectures import ARCHITECTURES, tensor_names
from mlx_dora.export.modelfile import chat_pieces, modelfile
from mlx_dora.export.row_order import halves_order, pairs_order
from mlx_dora.peft.names import names_of
from tests.adapters.training import QV, train
from tests.checks import to_numpy

gguf = pytest.importorskip("gguf")
MakeFolder = Callable[..., Path]
KEYS = (*QV, "self_attn.k_proj", "mlp.down_proj")


@pytest.fixture
def base(make_tiny_folder: MakeFolder) -> Path:
    return make_tiny_folder("base")


def trained(base: Path, kind: str = "lora", **config: object) -> Adapter:
    model, _ = load(base)
    settings = {"num_layers": 2, "keys": KEYS, "rank": 4, "scale": 3.0, **config}
    train(model, DoRAConfig(**settings), kind)  # pyright: ignore[reportArgumentType]
    return take_adapter(model)


def read(path: Path) -> tuple[dict, dict[str, np.ndarray]]:
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {t.name: np.array(t.data) for t in reader.tensors}


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order, row by row: 0, half, 1, half + 1, ... in each head."""
    size = len(rows) // heads
    order = [
        head * size + half * (size // 2) + i
        for head in range(heads)
        for i in range(size // 2)
        for half in (0, 1)
    ]
    return rows[order]


def test_rows_of_q_and_k_go_into_llama_cpps_order_and_back() -> None:
    rows = mx.arange(48.0).reshape(24, 2)
    moved = pairs_order(rows, 3)
    assert np.array_equal(to_numpy(moved), interleaved(to_numpy(rows), 3))
    assert mx.array_equal(halves_order(moved, 3), rows)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"rank_pattern": {"v_proj": 2}},
        {"rank_pattern": {"v_proj": 2}, "use_rslora": True},
    ],
    ids=["one rank", "two ranks", "rslora"],
)
def test_update_of_each_weight_is_ours(
    base: Path, tmp_path: Path, config: dict
) -> None:
    adapter = trained(base, **config)
    done = to_gguf(adapter, tmp_path / "out", model_folder=base)
    assert (done.architecture, done.tensors) == ("llama", 16)
    fields, tensors = read(tmp_path / "out" / "adapter.gguf")
    assert fields["general.type"] == "adapter"
    assert fields["general.architecture"] == "llama"
    assert fields["adapter.type"] == "lora"
    assert len(tensors) == 16
    names = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v"}
    for path in adapter.paths:
        block, last = path.split(".")[2], path.rpartition(".")[2]
        stem = f"blk.{block}.{names.get(last, 'ffn_down')}.weight"
        a, b = tensors[f"{stem}.lora_a"], tensors[f"{stem}.lora_b"]
        # llama.cpp: alpha over the rank of this pair
        theirs = fields["adapter.lora.alpha"] / a.shape[0] * b @ a
        ours_a = to_numpy(adapter.tensors[f"{path}.lora_a"])
        ours_b = to_numpy(adapter.tensors[f"{path}.lora_b"])
        ours = adapter.config.scale_of(path) * (ours_a @ ours_b).T
        heads = {"q_proj": 4, "k_proj": 2}.get(last)
        if heads:
            ours = interleaved(ours, heads)
        np.testing.assert_allclose(theirs, ours, rtol=1e-5, atol=1e-8)


def test_what_llama_cpp_has_not_is_refused_by_name(
    base: Path, make_tiny_folder: MakeFolder, tmp_path: Path
) -> None:
    with pytest.raises(DoRAError, match="reads LoRA only, got a dora adapter"):
        to_gguf(trained(base, "dora"), tmp_path / "a", model_folder=base)
    keys = (QV[0], "model.embed_tokens")
    with pytest.raises(DoRAError, match=r"embeddings .*: model\.embed_tokens"):
        to_gguf(trained(base, keys=keys), tmp_path / "a", model_folder=base)
    config = json.loads((base / "config.json").read_text())
    adapter = trained(base)
    (base / "config.json").write_text(json.dumps({**config, "model_type": "gpt_neox"}))
    with pytest.raises(DoRAError, match="adapters of gpt_neox do not convert"):
        to_gguf(adapter, tmp_path / "a", model_folder=base)
    assert not (tmp_path / "a").exists()


LINEARS = {
    "phi3": ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj"),
    "starcoder2": ("self_attn.q_proj", "mlp.c_fc", "mlp.c_proj"),
}
USUAL = (
    *(f"self_attn.{n}_proj" for n in "qkvo"),
    *(f"mlp.{n}_proj" for n in ("gate", "up", "down")),
)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_linear_layer_of_a_class_has_a_name(kind: str) -> None:
    assert names_of(kind) is not None
    name = tensor_names(kind, 2)
    paths = [f"model.layers.1.{end}" for end in LINEARS.get(kind, USUAL)]
    named = [name(path) for path in paths]
    assert None not in named
    assert len(set(named)) == len(paths)
    assert all(str(n).startswith("blk.1.") for n in named)
    assert name("model.layers.7.self_attn.q_proj") is None


def test_the_template_says_the_same_as_the_models(base: Path) -> None:
    text = modelfile(base, "base.gguf", adapter="./adapter.gguf")
    lines = text.content.splitlines()
    assert lines[:2] == ["FROM base.gguf", "ADAPTER ./adapter.gguf"]
    assert 'PARAMETER stop "<|im_end|>"' in lines
    assert text.has_template
    pieces = chat_pieces(load_tokenizer(base))
    assert pieces is not None
    assert pieces.user == ("<|im_start|>user\n", "<|im_end|>\n")
    assert '{{ else if eq .Role "user" }}<|im_start|>user' in pieces.go_template()


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0]['content'] }}",  # only the first message
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"
        "{% for m in messages %}[{{ m['content'] }}]{% endfor %}",
        "{% for m in messages %}{{ m['role'] }} {{ loop.index }}: {{ m['content'] }}\n"
        "{% endfor %}",
    ],
)
def test_a_template_that_is_no_sum_is_left_out(base: Path, template: str) -> None:
    path = base / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "chat_template": template}))
    text = modelfile(base, "base.gguf")
    assert not text.has_template
    assert 'TEMPLATE "' not in text.content


@pytest.mark.real_model
def test_template_of_smollm_with_its_default_system_message(smollm: Path) -> None:
    text = modelfile(smollm, "base.gguf")
    assert text.has_template
    assert "{{ if not .System }}<|im_start|>system\nYou are a helpful" in text.content
    assert 'PARAMETER stop "<|im_end|>"' in text.content


def test_command_writes_lora_and_gguf(base: Path, tmp_path: Path) -> None:
    model, _ = load(base)
    train(model, DoRAConfig(num_layers=2, keys=KEYS))
    save_adapter(model, tmp_path / "dora", base_model=str(base))
    data = tmp_path / "data"
    data.mkdir()
    (data / "valid.jsonl").write_text('{"text": "the quick brown fox"}\n' * 3)
    run = CliRunner().invoke
    common = [str(tmp_path / "dora"), str(tmp_path / "lora"), "--rank", "8"]
    done = run(convert, [*common, "--to", "lora", "--data", str(data), "-v"])
    assert done.exit_code == 0, done.output
    assert "LoRA of rank 8: 8 matrices, which miss" in done.output
    assert "Loss on the data: base" in done.output
    assert "model.layers.0.mlp.down_proj: misses" in done.output
    common[1] = str(tmp_path / "gguf")
    done = run(convert, [*common, "--to", "gguf", "--json", str(tmp_path / "r.json")])
    assert done.exit_code == 0, done.output
    assert sorted(p.name for p in (tmp_path / "gguf").iterdir()) == [
        "Modelfile",
        "adapter.gguf",
    ]
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["tensors"] == 16 and found["rank"] == 8
    done = run(convert, [*common[:2], "--rank", "8"])
    assert done.exit_code == 2
    assert "--rank has no effect" in done.output


CONVERTER = """#!/usr/bin/env python3
import pathlib, sys
if "fail" in sys.argv[1]:
    sys.exit("no such architecture")
assert (pathlib.Path(sys.argv[1]) / "config.json").exists()
pathlib.Path(sys.argv[sys.argv.index("--outfile") + 1]).write_text("gguf")
"""


def test_fuse_exports_through_llama_cpps_converter(
    base: Path,
    make_tiny_folder: MakeFolder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, _ = load(base)
    train(model, DoRAConfig(num_layers=2, keys=QV))
    save_adapter(model, tmp_path / "dora", base_model=str(base))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    args = ["--adapter-path", str(tmp_path / "dora"), "--export", "gguf"]
    done = CliRunner().invoke(fuse, [*args, "--save-path", str(tmp_path / "f1")])
    assert done.exit_code == 0, done.output
    typed = f"python convert_hf_to_gguf.py {tmp_path / 'f1'} --outfile"
    assert typed in done.output.replace("\n  ", " ")
    assert (tmp_path / "f1" / "Modelfile").read_text().startswith("FROM ./model.gguf")
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin" / "convert_hf_to_gguf.py"
    script.write_text(CONVERTER)
    script.chmod(script.stat().st_mode | stat.S_IEXEC)
    done = CliRunner().invoke(fuse, [*args, "--save-path", str(tmp_path / "f2")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "f2" / "model.gguf").read_text() == "gguf"
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path / "bin"))
    assert fused_to_gguf(tmp_path / "f2").path == tmp_path / "f2" / "model.gguf"
    (tmp_path / "f2").rename(tmp_path / "fail")
    (tmp_path / "fail" / "model.gguf").unlink()
    with pytest.raises(DoRAError, match="exit code 1: no such architecture"):
        fused_to_gguf(tmp_path / "fail")
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path))
    with pytest.raises(DoRAError, match=r"LLAMA_CPP is .*, which has no convert_hf"):
        fused_to_gguf(tmp_path / "f1")
    packed = make_tiny_folder("packed", bits=4)
    with pytest.raises(DoRAError, match="fuse with --mode dequantize"):
        fused_to_gguf(packed)
