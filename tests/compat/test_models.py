"""mlx-lm's models: a handful on every run, all of them against docs/models.md."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models
import pytest

from mlx_dora import DoRAError, apply_dora
from mlx_dora.adapters.surgery import dora_layers
from tests.compat.model_table import BITS, outcomes, render
from tests.compat.put_through import ALL, TOKENS, put_through
from tests.compat.tiny_models import build, model_files

PAGE = Path(__file__).parents[2] / "docs" / "models.md"


@pytest.mark.parametrize(
    ("name", "has_experts"),
    [
        ("gemma2", False),
        ("mamba", False),
        ("phi3", False),
        ("qwen3_5", True),
        ("deepseek_v3", True),
        ("gpt_oss", True),
        ("olmoe", True),
        ("qwen3_moe", True),
    ],
)
def test_a_model_comes_through(name: str, has_experts: bool) -> None:
    found = put_through(name)
    assert found.state == "works", found.reason
    assert ("SwitchLinear" in found.bases) == has_experts
    assert found.adapted > 3
    assert not found.idle


def test_a_packed_model_comes_through() -> None:
    found = put_through("qwen3_moe", BITS)
    assert found.state == "works", found.reason
    assert {"QuantizedLinear", "QuantizedSwitchLinear"} <= found.bases


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("afm7", r"layers\.0\.self_attn\.qkv_proj.*: .*afm7\.FusedLinear cannot take"),
        ("bitnet", r"layers\.0\.mlp\.down_proj.* and 18 more: .*BitLinear cannot take"),
        (
            "prism_hadamard_qwen35",
            r"layers\.0\.mlp\.gate_proj.*: .*HadamardQuantizedLinear cannot take",
        ),
        ("recurrent_gemma", r"recurrent_gemma\.Model does not call nn\.Module"),
    ],
)
def test_what_cannot_be_adapted_is_refused_by_name(name: str, message: str) -> None:
    model = build(name)
    with pytest.raises(DoRAError, match=message):
        apply_dora(model, ALL)
    assert dora_layers(model) == []


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("gemma3n", r"layers\.0\.altup\.prediction_coefs"),
        ("kimi_k3", r"layers\.0\.self_attention_res_proj"),
    ],
)
def test_what_a_model_reads_itself_is_refused_by_name(name: str, module: str) -> None:
    model: Any = build(name)
    apply_dora(model, ALL)
    with pytest.raises(DoRAError, match=rf"{module}: the model's own code reads its"):
        model.train()(TOKENS)


def test_the_page_names_every_file() -> None:
    folder = Path(mlx_lm.models.__file__).parent
    files = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    assert files == model_files().keys()
    words = PAGE.read_text(encoding="utf-8").replace(",", " ").replace(".", " ").split()
    assert not files - set(words)


def _no_gradient_of_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlx_lm.models import deepseek_v41

    def straight_through(rounded: Callable[..., mx.array]) -> Callable[..., mx.array]:
        return lambda x, *a, **k: x + mx.stop_gradient(rounded(x, *a, **k) - x)

    for name in ("_fake_quant_fp8", "_fake_quant_fp4"):
        rounded = getattr(deepseek_v41, name)
        monkeypatch.setattr(deepseek_v41, name, straight_through(rounded))
    choose = mx.argpartition
    monkeypatch.setattr(
        mx, "argpartition", lambda *a, **k: mx.stop_gradient(choose(*a, **k))
    )


def _masks_of_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    build("olmo")
    monkeypatch.setattr(
        "mlx_lm.models.olmo.create_attention_mask",
        lambda h, _: nn.MultiHeadAttention.create_additive_causal_mask(h.shape[1]),
    )


def _a_started_module(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlx_lm.models.recurrent_gemma import Model

    def start(self: Any, args: Any) -> None:
        nn.Module.__init__(self)
        forgetful(self, args)

    forgetful = Model.__init__
    monkeypatch.setattr(Model, "__init__", start)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "correct"),
    [
        ("deepseek_v41", _no_gradient_of_choices),
        ("olmo", _masks_of_numbers),
        ("recurrent_gemma", _a_started_module),
    ],
)
def test_a_class_comes_through_once_its_fault_is_put_right(
    name: str,
    correct: Callable[[pytest.MonkeyPatch], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert put_through(name).state in ("broken", "refused")
    correct(monkeypatch)
    found = put_through(name)
    assert found.state == "works", found.reason


@pytest.mark.slow
@pytest.mark.skipif(mx.metal.is_available(), reason="the page is written without Metal")
def test_the_page_says_what_happens() -> None:
    assert render(outcomes(), outcomes(BITS)) == PAGE.read_text(encoding="utf-8")
