"""Complete models with experts: adapted, trained, saved, loaded, fused, compared."""

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.models.switch_layers import SwitchLinear

from mlx_dora import (
    DoRAConfig,
    DoRAError,
    DoRAMultiLinear,
    DoRASwitchLinear,
    apply_dora,
    disabled,
    fuse_dora,
    load,
    load_adapter,
    remove_dora,
    save_adapter,
)
from mlx_dora.adapters.adapter import take_adapter
from mlx_dora.adapters.attach import attach_adapter
from mlx_dora.adapters.named import NamedAdapters
from mlx_dora.adapters.surgery import adapter_layers
from mlx_dora.fuse.config import FuseConfig
from mlx_dora.fuse.model import fuse_model
from mlx_dora.fuse.stream import stream_fused
from mlx_dora.layers import _layer
from mlx_dora.peft import to_peft
from mlx_dora.train import TrainConfig, finetune
from tests.adapters.stacks import (
    EXPERTS,
    HEADS,
    TOKENS,
    dense_stack,
    make_adapter,
    make_model,
    write_folder,
)
from tests.checks import assert_close, to_numpy

ROWS = [[(start * 7 + step * 3) % 64 for step in range(24)] for start in range(16)]
DORA = DoRAConfig(rank=3, scale=2.0, num_layers=2)


def trained(model: nn.Module, folder: Path, dora: DoRAConfig = DORA) -> list[float]:
    """Train on counting, and return the losses."""
    losses: list[float] = []
    finetune(
        model,
        None,
        ROWS,
        None,
        train=TrainConfig(
            iters=12, batch_size=4, learning_rate=1e-2, steps_per_report=1
        ),
        dora=dora,
        adapter_path=folder,
        callback=lambda report: losses.append(report.train_loss or 0.0),
    )
    return losses


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
def test_trains_saves_loads_and_fuses(
    kind: str, bits: int | None, tmp_path: Path
) -> None:
    model = make_model(kind, bits)
    base = model(TOKENS)
    losses = trained(model, tmp_path / "adapter")
    assert losses[-1] < losses[0] - 0.5
    experts = [
        p for p, layer in adapter_layers(model) if type(layer) is DoRASwitchLinear
    ]
    assert len(experts) == 6  # gate, up and down of two blocks
    model.eval()
    adapted = to_numpy(model(TOKENS))

    again = make_model(kind, bits)
    attach_adapter(again, load_adapter(tmp_path / "adapter"))
    assert_close(again(TOKENS), adapted)
    with disabled(again):
        assert mx.array_equal(again(TOKENS), base)
    report = fuse_dora(again, dequantize=True)
    assert {layer.path for layer in report.layers} >= set(experts)
    assert report.total.kept == pytest.approx(1, abs=1e-3)
    assert_close(again(TOKENS), adapted, bound=1e-4)

    remove_dora(model)
    assert mx.array_equal(model(TOKENS), base)


def joined(blocks: Iterable[mx.array], shape: tuple[int, ...]) -> mx.array:
    return mx.concatenate([block.reshape(-1) for block in blocks]).reshape(shape)


@pytest.mark.parametrize("bits", [None, 4])
def test_streamed_fuse_equals_the_one_in_memory(
    bits: int | None, tmp_path: Path
) -> None:
    trained(make_model("qwen3_moe", bits), tmp_path / "adapter")
    adapter = load_adapter(tmp_path / "adapter")
    model = make_model("qwen3_moe", bits)
    attach_adapter(model, adapter)
    fuse_dora(model)
    expected = dict(tree_flatten(model.parameters()))
    written: dict[str, mx.array] = {}
    fused = stream_fused(
        make_model("qwen3_moe", bits),
        adapter,
        FuseConfig(keep=0.0),
        lambda name, _, shape, blocks: written.update({name: joined(blocks, shape)}),
    )
    assert not fused.packing
    assert written.keys() == expected.keys()
    for name, value in expected.items():
        assert mx.allclose(written[name], value, rtol=1e-5, atol=1e-6), name


def test_packed_experts_get_more_bits_until_enough_is_kept(tmp_path: Path) -> None:
    trained(make_model("qwen3_moe", 2), tmp_path / "adapter")
    adapter = load_adapter(tmp_path / "adapter")
    written: dict[str, mx.array] = {}
    fused = stream_fused(
        make_model("qwen3_moe", 2),
        adapter,
        FuseConfig(keep=0.95),
        lambda name, _, shape, blocks: written.update({name: joined(blocks, shape)}),
    )
    layers = {layer.path: layer for layer in fused.layers}
    stacks = [path for path in layers if "switch_mlp" in path]
    assert stacks
    for path in stacks:
        assert layers[path].survival.survives(0.95)
        setting = fused.packing.get(path)
        if setting is None:
            continue
        model = make_model("qwen3_moe", None)
        if setting:
            assert isinstance(setting, dict)
            nn.quantize(
                model,
                group_size=setting["group_size"],
                bits=setting["bits"],
                class_predicate=lambda p, _, path=path: p == path,
            )
        like: Any = dict(tree_flatten(model.parameters()))[f"{path}.weight"]
        assert written[f"{path}.weight"].shape == like.shape


def test_the_folder_holds_mlx_lm_s_layout(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model = make_model("mixtral", None)
    apply_dora(model, DORA)
    save_adapter(model, tmp_path / "dora")
    assert "stock mlx-lm cannot run DoRA on experts" in caplog.text
    config = json.loads((tmp_path / "dora" / "adapter_config.json").read_text())
    tensors: Any = mx.load(str(tmp_path / "dora" / "adapters.safetensors"))
    theirs = make_model("mixtral", None)
    keys = config["lora_parameters"]["keys"]
    linear_to_lora_layers(
        theirs,
        2,
        {"rank": 3, "scale": 2.0, "dropout": 0.0, "keys": keys},
    )
    shapes = {
        name: value.shape
        for name, value in tree_flatten(theirs.parameters())
        if name.rpartition(".")[2] in ("lora_a", "lora_b")
        and isinstance(value, mx.array)
    }
    written = {n: v.shape for n, v in tensors.items() if not n.endswith(".m")}
    assert written == shapes


@pytest.mark.parametrize("bits", [None, 4])
def test_heads_of_latent_attention_train_where_they_are_named(
    bits: int | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_model("deepseek_v3", bits)
    base = model(TOKENS)
    losses = trained(model, tmp_path / "adapter", replace(DORA, keys=HEADS))
    assert losses[-1] < losses[0]
    assert "stock mlx-lm cannot run DoRA on" in caplog.text
    assert {type(layer) for _, layer in adapter_layers(model)} == {DoRAMultiLinear}
    model.eval()
    adapted = to_numpy(model(TOKENS))
    again = make_model("deepseek_v3", bits)
    attach_adapter(again, load_adapter(tmp_path / "adapter"))
    assert_close(again(TOKENS), adapted)
    one_by_one = to_numpy(token_by_token(again))
    assert_close(one_by_one, adapted, bound=1e-4)  # the other side of each matrix
    fuse_dora(again, dequantize=True)
    assert_close(again(TOKENS), adapted, bound=1e-4)
    remove_dora(model)
    assert mx.array_equal(model(TOKENS), base)
    apply_dora(model, DORA)
    assert not any("embed_q" in path for path, _ in adapter_layers(model))


def token_by_token(model: Any) -> mx.array:
    cache = make_prompt_cache(model)
    steps = [model(TOKENS[:, i : i + 1], cache=cache) for i in range(TOKENS.shape[1])]
    return mx.concatenate(steps, axis=1)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
def test_lossless_fuse_folds_g_into_the_scales_of_each_expert(
    kind: str, bits: int, tmp_path: Path
) -> None:
    folder = write_folder(tmp_path / "base", kind, bits)
    model, _ = load(folder)
    adapter = make_adapter(model, 1, (*EXPERTS[kind], "self_attn.q_proj"))
    save_adapter(adapter, tmp_path / "adapter")
    attach_adapter(model, adapter)
    expected = to_numpy(model(TOKENS))
    report = fuse_model(
        folder, tmp_path / "adapter", tmp_path / "fused",
        config=FuseConfig(mode="lossless"),
    )  # fmt: skip
    assert report.total.kept == pytest.approx(1, abs=1e-4)
    rest = tmp_path / "fused" / "adapter"
    ours, _ = load(tmp_path / "fused", rest)
    assert_close(ours(TOKENS), expected, bound=1e-5)
    stock = mlx_lm.load(str(tmp_path / "fused"), adapter_path=str(rest))[0]
    assert_close(stock(TOKENS), expected, bound=1e-5)

    fused = make_model(kind, bits)
    fused.load_weights(str(tmp_path / "fused" / "model.safetensors"))
    base = make_model(kind, bits)
    beside = load_adapter(rest)
    for path in adapter.paths:
        if "q_proj" in path:
            continue
        old, new = (dict(folder.named_modules())[path] for folder in (base, fused))
        assert mx.array_equal(old["weight"], new["weight"])
        truth = dense_stack(base, adapter, path)
        assert_close(dense_stack(fused, beside, path), truth, bound=1e-6)


def test_lossless_fuse_of_heads_is_refused_by_name(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "base", "deepseek_v3", 4)
    adapter = make_adapter(load(folder)[0], 1, EXPERTS["deepseek_v3"])
    save_adapter(adapter, tmp_path / "adapter")
    with pytest.raises(DoRAError, match=r"no LoRA layer for .*0.self_attn.embed_q"):
        fuse_model(
            folder, tmp_path / "adapter", tmp_path / "fused",
            config=FuseConfig(mode="lossless"),
        )  # fmt: skip
    assert not (tmp_path / "fused").exists()


@pytest.mark.parametrize("mode", ["requantize", "dequantize"])
def test_packed_heads_fuse_into_a_folder(mode: Any, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "base", "deepseek_v3", 4)
    model, _ = load(folder)
    adapter = make_adapter(model, 1, EXPERTS["deepseek_v3"])
    save_adapter(adapter, tmp_path / "adapter")
    attach_adapter(model, adapter)
    expected = to_numpy(model(TOKENS))
    report = fuse_model(
        folder, tmp_path / "adapter", tmp_path / "fused",
        config=FuseConfig(mode=mode, keep=0.99),
    )  # fmt: skip
    assert all(layer.survival.survives(0.99) for layer in report.layers)
    output = mlx_lm.load(str(tmp_path / "fused"))[0](TOKENS)
    assert_close(output, expected, bound=0.1 if mode == "requantize" else 1e-4)


@pytest.mark.parametrize("bits", [None, 4])
def test_named_adapters_swap_and_blend(
    bits: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("deepseek_v3", bits)
    keys = (*EXPERTS["deepseek_v3"], "mlp.down_proj")
    adapters = [make_adapter(model, 1, keys), make_adapter(model, 2, keys[:2], rank=5)]
    alone = []
    for adapter in adapters:
        attach_adapter(model, adapter)
        alone.append(to_numpy(model(TOKENS)))
        remove_dora(model)
    shelf = NamedAdapters(model)
    shelf.add("first", adapters[0])
    shelf.add("second", adapters[1])
    for name, expected in zip(("first", "second"), alone, strict=True):
        shelf.set_adapter(name)
        assert_close(model(TOKENS), expected)
    path = "model.layers.1.mlp.switch_mlp.gate_proj"
    shelf.set_adapter(None)
    before, first, second = (
        dense_stack(model, adapter, path)
        for adapter in (replace(adapters[0], tensors={}), *adapters)
    )
    shelf.set_adapter({"first": 0.7, "second": 0.5})
    monkeypatch.setattr(_layer, "exact_terms", None)  # the norms are known
    layer: Any = dict(model.named_modules())[path]
    layer.gain()
    weight = layer.fuse(dequantize=True)["weight"]
    blended = before + 0.7 * (first - before) + 0.5 * (second - before)
    assert_close(weight, blended)
    gain = layer.m / layer.norm()
    assert_close(layer.gain(), to_numpy(gain))


def test_peft_refuses_stacks_by_name(tmp_path: Path) -> None:
    adapter = make_adapter(make_model("deepseek_v3"), 1, EXPERTS["deepseek_v3"])
    with pytest.raises(DoRAError, match=r"experts.*embed_q.*switch_mlp.gate_proj"):
        to_peft(adapter, tmp_path / "peft")


@pytest.mark.parametrize(
    ("bits", "mode"),
    [(None, "requantize"), (4, "requantize"), (4, "lossless"), (4, "in memory")],
)
def test_fuse_makes_no_float32_array_as_large_as_the_experts(
    bits: int | None, mode: Any
) -> None:
    mx.random.seed(0)
    base = SwitchLinear(256, 256, 64, bias=False)
    base.set_dtype(mx.bfloat16)
    model = nn.Module()
    model.experts = base if bits is None else base.to_quantized(64, bits)
    mx.eval(model.parameters())
    config = DoRAConfig(rank=4, scale=2.0, keys=("experts",), num_layers=0)
    apply_dora(model, config)
    adapter = take_adapter(model)
    mx.eval(model.parameters(), adapter.tensors)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    if mode == "in memory":
        fuse_dora(model)
    else:
        remove_dora(model)
        fuse_config = FuseConfig(mode=mode, keep=0.0)
        write = lambda _, __, ___, blocks: mx.eval(list(blocks))  # noqa: E731
        stream_fused(model, adapter, fuse_config, write)
    # The fused experts, a second copy while they are stacked, and blocks of an expert.
    own = 64 * 256 * 256 * (2 if bits is None else 5 / 8)
    assert mx.get_peak_memory() - before < 2.7 * own
