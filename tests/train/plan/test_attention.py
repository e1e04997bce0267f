"""Attention whose backward pass needs no array of scores, and plans for a Mac."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_dora import DoRAConfig
from mlx_dora.train import TrainConfig, plan_memory
from mlx_dora.train.plan.attention import (
    AttentionCall,
    Device,
    attention_calls,
    count_scored,
    metal_device,
    this_device,
)
from mlx_dora.train.plan.predict import predict
from mlx_dora.train.plan.step import plan_step
from tests.compat.tiny_models import build
from tests.data.test_documents import make
from tests.train.plan.test_predict import BIG, config

CPU = Device(kind="cpu")
MAC = metal_device("0.32.4")
WIDTHS = {64, 72, 80, 96, 128, 192, 256}
PLAIN = AttentionCall(query_width=128, value_width=128)
LIMIT = 64 << 30


@pytest.mark.parametrize(
    ("version", "widths"),
    [
        ("0.32.3", set()),
        ("0.31.99", set()),
        ("0.32.4", WIDTHS),
        ("0.32.4.dev20261009+abc", WIDTHS),
        ("0.33.0", WIDTHS),
        ("1.0", WIDTHS),
    ],
)
def test_the_version_decides_without_a_library(version: str, widths: set[int]) -> None:
    device = metal_device(version)
    assert (device.kind, device.fused_widths) == ("metal", widths)


def test_the_names_of_the_kernels_decide(tmp_path: Path) -> None:
    library = tmp_path / "mlx.metallib"
    names = ("sdpa_vjp_odo_float_64", "sdpa_vjp_odo_bfloat16_t_100", "sdpa_vector_72")
    library.write_bytes(b"".join(b"NAME\x17\0%s\0TYPE" % n.encode() for n in names))
    assert metal_device("0.1", library).fused_widths == {64, 100}
    assert metal_device("0.32.4", tmp_path / "none").fused_widths == WIDTHS


def test_the_switch_of_mlx_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_SDPA_VJP_FALLBACK", "1")
    assert metal_device("0.32.4").fused_widths == set()
    monkeypatch.setenv("MLX_SDPA_VJP_FALLBACK", "0")
    assert metal_device("0.32.4").fused_widths == WIDTHS


def test_this_machine_keeps_scores() -> None:
    if mx.default_device() == mx.cpu:
        assert this_device() == CPU


@pytest.mark.parametrize(
    ("call", "is_fused"),
    [
        (PLAIN, True),
        (replace(PLAIN, has_array_mask=True), False),
        (replace(PLAIN, has_sinks=True), False),
        (replace(PLAIN, value_width=64), False),
        (AttentionCall(query_width=112, value_width=112), False),
        (AttentionCall(query_width=512, value_width=512), False),
    ],
)
def test_what_is_fused(call: AttentionCall, is_fused: bool) -> None:
    assert MAC.fuses(call) == is_fused
    assert not CPU.fuses(call)


def test_calls_are_read_from_the_model() -> None:
    plain = mx.fast.scaled_dot_product_attention
    model = make("llama")  # a window of 4 in every other block
    short, long = (attention_calls(model, length) for length in (4, 5))
    assert [call.has_array_mask for call in short] == [False, False]
    assert [call.has_array_mask for call in long] == [True, False]
    assert {(call.query_width, call.value_width) for call in long} == {(8, 8)}
    assert attention_calls(make("gemma2"), 8) == ()
    assert all(call.has_sinks for call in attention_calls(build("gpt_oss"), 8))
    assert mx.fast.scaled_dot_product_attention is plain
    device = Device(kind="metal", fused_widths=frozenset({8}))
    assert count_scored(long, 2, 2, device) == 1
    assert count_scored(long, 2, 1, device) == 0  # the last block has no window
    assert count_scored((), 2, 2, device) == 2


def test_no_layer_is_computed(make_tiny_model: Callable[..., nn.Module]) -> None:
    model = make_tiny_model()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    assert len(attention_calls(model, 1 << 17)) == 2
    assert mx.get_peak_memory() - before < 1 << 20


BIG_CALLS = replace(BIG, attention=lambda length: (PLAIN,) * 32)
TRAIN = TrainConfig(model="x", batch_size=2, max_seq_length=4097)


def test_on_a_mac_only_blocks_of_scores_exist() -> None:
    cpu = plan_step(BIG_CALLS, TRAIN, LIMIT, CPU)
    mac = plan_step(BIG_CALLS, TRAIN, LIMIT, MAC)
    assert (cpu.scored_blocks, cpu.device) == (32, "cpu")
    assert (mac.scored_blocks, mac.device) == (0, "metal")
    assert cpu.scores == 34 * 2 * 32 * 4096**2 * 2
    assert mac.scores == 2 * 2 * 32 * 1024**2 * 2
    assert cpu.peak - mac.peak == cpu.scores - mac.scores
    assert cpu.activations == mac.activations
    assert 2 * mac.logits == cpu.logits  # in the model's dtype
    # Longer rows fit.
    assert predict(BIG_CALLS, TRAIN, 2 * LIMIT, MAC).longest > 2 * (
        predict(BIG_CALLS, TRAIN, 2 * LIMIT, CPU).longest
    )
    light = replace(TRAIN, grad_checkpoint=True)
    assert plan_step(BIG_CALLS, light, LIMIT, MAC).scores == mac.scores


def test_windows_and_other_attention_keep_scores_on_a_mac() -> None:
    masked = replace(PLAIN, has_array_mask=True)

    def windowed(length: int) -> tuple[AttentionCall, ...]:
        return (masked if length > 1024 else PLAIN, PLAIN) * 16

    shapes = replace(BIG, attention=windowed)
    score, block = 2 * 32 * 4096**2 * 2, 2 * 32 * 1024**2 * 2
    mac = plan_step(shapes, TRAIN, LIMIT, MAC)
    assert mac.scored_blocks == 16
    assert mac.scores == (16 + 2) * score + 2 * block
    short = plan_step(shapes, replace(TRAIN, max_seq_length=1025), LIMIT, MAC)
    assert (short.scored_blocks, short.scores) == (0, 2 * block)
    own = plan_step(BIG, TRAIN, LIMIT, MAC)  # no call of MLX's attention
    assert own.scores == plan_step(BIG, TRAIN, LIMIT, CPU).scores
    old = plan_step(BIG_CALLS, TRAIN, LIMIT, metal_device("0.32.3"))
    assert old.scores == own.scores


def test_packed_documents_have_scores_of_their_own() -> None:
    train = replace(TRAIN, packing=True)
    whole = plan_step(BIG_CALLS, train, LIMIT, CPU)
    packed = plan_step(BIG_CALLS, train, LIMIT, CPU, document=1500)
    assert whole.scores == 34 * 2 * 32 * 4096**2 * 2
    assert packed.scores == 34 * 2 * 32 * (2 * 1500**2 + 1096**2) * 2
    masked = plan_step(BIG, train, LIMIT, CPU, document=1500)
    assert masked.scores == whole.scores
    mac = plan_step(BIG_CALLS, train, LIMIT, MAC, document=500)
    assert mac.scores == 2 * 2 * 32 * 500**2 * 2


def test_the_worst_batch_of_tokens_is_planned(tiny_model_folder: Path) -> None:
    dora = DoRAConfig(rank=4, num_layers=1)
    lengths = [40] * 10 + [300, 301, 302]

    def plan(**settings: Any) -> Any:
        train = config(tiny_model_folder, max_seq_length=512, **settings)
        return plan_memory(train, dora, lengths=lengths, device=CPU)

    filled = plan(batch_tokens=620)
    assert (filled.batch_size, filled.length) == (2, 302)
    # Fixed batches are padded to 305 tokens.
    assert plan(batch_size=1).peak < filled.peak < plan(batch_size=2).peak
    assert filled.rows == 13
    none = config(tiny_model_folder, max_seq_length=512, batch_tokens=2000)
    unknown = plan_memory(none, dora, device=CPU)
    assert (unknown.batch_size, unknown.length) == (3, 512)
    tight = plan_memory(none, dora, lengths=lengths, limit=2_000_000, device=CPU)
    assert not tight.fits
    assert any(flag.startswith("--batch-tokens ") for flag in tight.advice)
    with pytest.raises(ValueError, match="batch_tokens 100 holds no row of 302"):
        plan(batch_tokens=100)
