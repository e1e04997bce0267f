"""Classes whose modules transformers names otherwise: the table, and PEFT on them."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_dora.adapters.adapter import Adapter
from mlx_dora.adapters.attach import attach_adapter
from mlx_dora.adapters.config import DoRAConfig
from mlx_dora.adapters.files import load_adapter, save_adapter
from mlx_dora.adapters.hosting import load_lazily
from mlx_dora.peft import from_peft, to_peft
from mlx_dora.peft.classes import DIFFERENT, PEFT_REFUSES, SAME
from mlx_dora.peft.names import names_of
from tests.adapters.training import TOKENS, train
from tests.compat.peer_process import peer_version, run_peer
from tests.compat.tiny_models import build
from tests.hosts import ran

pytestmark = pytest.mark.slow

TEXT = {
    "vocab_size": 260, "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "max_position_embeddings": 128,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
}  # fmt: skip
GPT = {"vocab_size": 260, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
CONFIGS: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": {**TEXT, "num_hidden_layers": 6}, "vision_config": VISION,
        "mm_tokens_per_image": 4,
    },
    "gpt_neox": {**TEXT, "intermediate_size": 128},  # mlx-lm knows no other width
    "gpt2": GPT,
    "gptj": {**GPT, "rotary_dim": 4, "tie_word_embeddings": False},
}  # fmt: skip
KEYS = {
    "gemma3": ("self_attn.q_proj", "mlp.down_proj"),
    "gpt_neox": ("attention.query_key_value", "mlp.dense_4h_to_h"),
    "gpt2": ("attn.c_attn", "attn.c_proj", "mlp.c_fc"),
    "gptj": ("attn.q_proj", "mlp.fc_out"),
}
# What configs on the Hub have, mlx-lm asks for, and transformers 5 no longer writes.
HUB_KEYS: dict[str, dict[str, Any]] = {
    "gemma3": {"vocab_size": 260},
    "gpt_neox": {"rotary_emb_base": 10000, "rotary_pct": 0.25},
    "gpt2": {"n_ctx": 64},
    "gptj": {"n_ctx": 64},
}


def peer(name: str, at: Path, job: dict[str, Any]) -> dict:
    return run_peer(
        "peft_peer.py", name, at / name, job, {"tokens": TOKENS.astype(mx.int64)}
    )


def largest(value: mx.array) -> float:
    return mx.max(mx.abs(value)).item()  # pyright: ignore[reportReturnType]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random model of each class, written by transformers."""
    at = tmp_path_factory.mktemp("bases")
    configs = {name: {"model_type": name, **c} for name, c in CONFIGS.items()}
    peer("make", at, {"configs": configs, "out": str(at)})
    for name in CONFIGS:
        folder = shutil.copytree(at / name, at / f"{name}-mlx")
        config = json.loads((folder / "config.json").read_text())
        config |= HUB_KEYS.get(name, {})
        (folder / "config.json").write_text(json.dumps(config))
    # As GPT-2's files on the Hub, which are older than the prefix.
    file = str(at / "gpt2-mlx" / "model.safetensors")
    tensors = mx.load(file)
    assert isinstance(tensors, dict)
    mx.eval(tensors)
    mx.save_safetensors(
        file, {name.removeprefix("transformer."): v for name, v in tensors.items()}
    )
    return at


@pytest.mark.parametrize("name", CONFIGS)
def test_peft_computes_the_same_with_our_adapter(
    bases: Path, name: str, tmp_path: Path
) -> None:
    base = bases / f"{name}-mlx"
    model = load_lazily(base)
    plain = model(TOKENS)
    ours = train(model, DoRAConfig(rank=3, num_layers=-1, keys=KEYS[name]))
    save_adapter(model, tmp_path / "adapter", base_model=str(base))
    to_peft(tmp_path / "adapter", tmp_path / "peft")
    job = {"model": str(bases / name), "adapter": str(tmp_path / "peft")}
    theirs = peer("logits", tmp_path, job)
    drift = largest(theirs["base"] - plain)  # what the libraries differ by anyway
    assert largest(theirs["adapted"] - theirs["base"]) > max(0.01, 10 * drift)
    assert largest(theirs["adapted"] - ours) < max(1e-4, 2 * drift)
    first, again = load_adapter(tmp_path / "adapter"), from_peft(tmp_path / "peft")
    assert again.config == first.config
    assert all(mx.array_equal(again.tensors[n], v) for n, v in first.tensors.items())


@pytest.mark.parametrize("name", CONFIGS)
def test_we_compute_the_same_with_pefts_adapter(
    bases: Path, name: str, tmp_path: Path
) -> None:
    keys = [key.rpartition(".")[2] for key in KEYS[name]]
    config = {"r": 4, "lora_alpha": 8, "use_dora": True, "target_modules": keys}
    if name == "gpt2":
        config["fan_in_fan_out"] = True
    if name == "gemma3":  # its vision tower has modules of the same names
        config["target_modules"] = r".*language_model.*\.(q_proj|down_proj)"
    job = {
        "model": str(bases / name), "adapter": str(tmp_path / "peft"),
        "config": config, "learning_rate": 0.02, "steps": 3,
    }  # fmt: skip
    theirs = peer("train", tmp_path, job)
    model = load_lazily(bases / f"{name}-mlx")
    drift = largest(theirs["base"] - model(TOKENS))
    adapter = from_peft(tmp_path / "peft", bases / f"{name}-mlx")
    attach_adapter(model, adapter)
    model.eval()
    assert largest(theirs["adapted"] - theirs["base"]) > max(0.01, 10 * drift)
    assert largest(model(TOKENS) - theirs["adapted"]) < max(1e-4, 2 * drift)


FOUR = {"num_hidden_layers": 4}
SECOND_DENSE = {**FOUR, "first_k_dense_replace": 1}
CONV = {**FOUR, "layer_types": ["conv", "full_attention"] * 2}
# What transformers needs to build a class as our tiny one is built.
SETTINGS: dict[str, dict[str, Any]] = {
    "deepseek_v2": SECOND_DENSE,
    "dots1": {**SECOND_DENSE, "n_routed_experts": 4, "n_shared_experts": 1},
    "ernie4_5_moe": FOUR,
    "gemma4": {
        "text_config": {
            **FOUR, "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2,
            "moe_intermediate_size": 32,
        }
    },
    "gemma4_text": {
        **FOUR, "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2,
        "moe_intermediate_size": 32,
    },
    "granitemoehybrid": {**FOUR, "layer_types": ["mamba", "attention"] * 2},
    "hunyuan": {**FOUR, "model_type": "hunyuan_v1_moe", "head_dim": 64},
    "hunyuan_v1_dense": {**FOUR, "head_dim": 64},
    "lfm2": CONV,
    "lfm2-vl": {"model_type": "lfm2_vl", "text_config": CONV},
    "lfm2_moe": CONV,
    "llama4": {"text_config": {**FOUR, "interleave_moe_layer_step": 2}},
    "llama4_text": {**FOUR, "interleave_moe_layer_step": 2},
    "minimax": {"model_type": "minimax_m2"},
    "minimax_m3_vl": {
        "text_config": {**FOUR, "mlp_layer_types": ["dense", "sparse"] * 2}
    },
    "mistral4": SECOND_DENSE,
    "nemotron": {**FOUR, "num_key_value_heads": 8, "head_dim": 64},
    "solar_open": SECOND_DENSE,
}  # fmt: skip
# Modules that only our tiny model has: its sizes ask for them.
ONLY_TINY = {
    "mimo_v2_flash": r"shared_experts",
    "qwen3_5": r"shared_expert",
    "solar_open": r"\.mlp\.(gate|up|down)_proj",
}
NOT_BUILT = {
    "dbrx": "transformers 5.24 cannot build its default",
    "gemma3n": "its vision tower needs timm",
    "pixtral": "transformers has the vision tower alone; as mistral3",
}


KINDS = [
    kind
    for kind in sorted({*SAME, *DIFFERENT} - NOT_BUILT.keys())
    if (names := names_of(kind)) is not None and names.refusal is None
]
CLASSES = {kind: {"model_type": kind, **SETTINGS.get(kind, {})} for kind in KINDS}


def numberless(path: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", ".#", path)


def test_every_linear_layer_is_where_the_table_says(tmp_path: Path) -> None:
    kinds, classes = KINDS, CLASSES
    out = tmp_path / "linears.json"
    peer("linears", tmp_path, {"classes": classes, "out": str(out)})
    theirs = json.loads(out.read_text())
    lost = {}
    for kind in kinds:
        names = names_of(kind)
        assert names is not None
        paths = [p for p, m in build(kind).named_modules() if isinstance(m, nn.Linear)]
        assert paths
        lost[kind] = {
            named
            for path in paths
            if not names.is_missing(path)
            and not re.search(ONLY_TINY.get(kind, "no such"), path)
            and (named := numberless(names.to_transformers(path))) not in theirs[kind]
        }
        if kind != "granitemoehybrid":  # whose tiny model has both kinds of projection
            assert [names.to_mlx(names.to_transformers(p)) for p in paths] == paths
    assert {kind: found for kind, found in lost.items() if found} == {}


def test_peft_loads_a_folder_of_every_class(tmp_path: Path) -> None:
    """DoRA of each kind of linear layer, at its first and last place in the model."""
    peer("shapes", tmp_path, {"classes": CLASSES, "out": str(tmp_path / "shapes.json")})
    theirs = json.loads((tmp_path / "shapes.json").read_text())
    counts = {}
    for kind in KINDS:
        names = names_of(kind)
        assert names is not None
        known = {numberless(p) for p, m in build(kind).named_modules() if is_linear(m)}
        places: dict[str, list[str]] = {}
        for path in theirs[kind]:
            ours = names.to_mlx(path)
            refused = path.rpartition(".")[2] in PEFT_REFUSES.get(kind, ())
            if numberless(ours) in known and not (names.is_missing(ours) or refused):
                places.setdefault(numberless(ours), []).append(path)
        chosen = {path for found in places.values() for path in (found[0], found[-1])}
        tensors = {}
        for path in chosen:
            out, width = theirs[kind][path]
            ours = names.to_mlx(path)
            tensors[f"{ours}.lora_a"] = mx.ones((width, 1))
            tensors[f"{ours}.lora_b"] = mx.ones((1, out))
            tensors[f"{ours}.m"] = mx.ones((out,))
        adapter = Adapter(config=DoRAConfig(rank=1), tensors=tensors)
        folder = tmp_path / "models" / kind
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({"model_type": kind}))
        to_peft(adapter, tmp_path / "adapters" / kind, model=folder)
        counts[kind] = len(chosen)
    job = {
        "classes": CLASSES,
        "adapters": str(tmp_path / "adapters"),
        "out": str(tmp_path / "loaded.json"),
    }
    peer("load_each", tmp_path, job)
    loaded = json.loads((tmp_path / "loaded.json").read_text())
    assert all(counts.values())
    failed = [f"{kind}: {found[0]}" for kind, found in loaded.items() if found[0]]
    assert failed == []
    assert {k: found[1] for k, found in loaded.items()} == {
        kind: 3 * count for kind, count in counts.items()
    }
    page = Path(__file__).parents[2] / "docs" / "peft.md"
    assert f"{len(KINDS)} classes" in page.read_text()
    ran(
        "PEFT",
        f"folders of {len(KINDS)} classes of models load",
        version=peer_version("peft"),
    )


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)
