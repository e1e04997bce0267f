"""Every model of mlx-lm with latent attention, on the heads' matrices alone."""

import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest

from mlx_dora import DoRAConfig, apply_dora, fuse_dora, load_adapter, save_adapter
from mlx_dora.adapters.attach import attach_adapter
from tests.checks import assert_close, to_numpy
from tests.compat.tiny_models import build
from tests.compat.tiny_sizes import VOCABULARY

TOKENS = mx.array([[(5 * i + 3 * j) % VOCABULARY for j in range(12)] for i in range(2)])
OTHERS = (
    "bailing_hybrid",
    "bailing_moe_v3",
    "deepseek_v32",
    "glm4_moe_lite",
    "kimi_k25",
    "kimi_vl",
    "longcat_flash_ngram",
)


@pytest.mark.parametrize(
    "name",
    [
        "deepseek_v3",
        "mistral4",
        *(pytest.param(n, marks=pytest.mark.slow) for n in OTHERS),
    ],
)
def test_heads_come_through(name: str) -> None:
    model: Any = build(name)
    kinds = ((path, type(one).__name__) for path, one in model.named_modules())
    keys = tuple(path for path, kind in kinds if kind == "MultiLinear")
    assert len(keys) > 1
    base = to_numpy(model(TOKENS))
    apply_dora(model, DoRAConfig(rank=2, scale=2.0, num_layers=-1, keys=keys))
    assert_close(model(TOKENS), base, bound=1e-6)
    losses = train(model)
    assert losses[-1] < losses[0]
    model.eval()
    adapted = to_numpy(model(TOKENS))
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(model, Path(folder) / "adapter")
        again: Any = build(name)
        attach_adapter(again, load_adapter(Path(folder) / "adapter"))
    assert_close(again(TOKENS), adapted, bound=1e-6)
    fuse_dora(again)
    assert_close(again(TOKENS), adapted)


def train(model: Any) -> list[float]:
    def loss(model: Any, tokens: mx.array) -> mx.array:
        logits = model(tokens[:, :-1]).astype(mx.float32)
        return nn.losses.cross_entropy(logits, tokens[:, 1:], reduction="mean")

    model.train()
    step = nn.value_and_grad(model, loss)
    optimizer = optim.Adam(learning_rate=1e-2)
    losses = []
    for _ in range(4):
        value, grads = step(model, TOKENS)
        optimizer.update(model, grads)
        mx.eval(model.parameters(), optimizer.state)
        losses.append(value.item())
    return losses
