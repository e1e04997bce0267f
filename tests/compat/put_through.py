"""One tiny model through everything: adapt, train, save, load, fuse, compare."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

from mlx_dora import (
    DoRAConfig,
    DoRAError,
    apply_dora,
    fuse_dora,
    load_adapter,
    save_adapter,
)
from mlx_dora.adapters.attach import attach_adapter
from tests.compat.tiny_models import VOCABULARY, build

TOKENS = mx.array([[(5 * i + 3 * j) % VOCABULARY for j in range(12)] for i in range(2)])
# Classes whose own forward pass ends the process at these sizes.
CRASHES = {"phi3small": "its block-sparse attention crashes MLX"}
# Relative to the largest logit. Layers start and load to the bit, but compiled
# activations of mlx-lm round by the layout of what they get.
EXACT = 1e-5
BOUND = 2e-4


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a model: ``works``, ``refused``, ``not built`` or ``fails``."""

    name: str
    state: str
    adapted: int = 0
    experts: int = 0
    reason: str = ""


def put_through(name: str) -> Outcome:
    """Say how far the model of that name comes."""
    if name in CRASHES:
        return Outcome(name=name, state="not built", reason=CRASHES[name])
    try:
        model = build(name)
        base = model(TOKENS)
        mx.eval(base)
    # Whatever the class raises for arguments that were guessed.
    except Exception as error:
        reason = " ".join(str(error).split())[:90]
        return Outcome(
            name=name, state="not built", reason=f"{type(error).__name__}: {reason}"
        )
    config = DoRAConfig(rank=2, scale=2.0, num_layers=-1)
    try:
        paths = apply_dora(model, config)
    except AttributeError as error:
        return Outcome(name=name, state="refused", reason=f"no nn.Module: {error}")
    except DoRAError as error:
        return Outcome(name=name, state="refused", reason=str(error)[:160])
    try:
        problem = _problem(name, model, base)
    # What training or loading this class raises, mlx-lm's own code included.
    except Exception as error:
        reason = " ".join(str(error).split())[:90]
        problem = f"{type(error).__name__}: {reason}"
    layers = dict(model.named_modules())
    return Outcome(
        name=name,
        state="fails" if problem else "works",
        adapted=len(paths),
        experts=sum(layers[path].m.ndim > 1 for path in paths),
        reason=problem,
    )


def _problem(name: str, model: Any, base: mx.array) -> str:
    if not mx.any(base):
        return "a random model of this class gives zeros: nothing to compare"
    if (off := _off(model(TOKENS), base)) > EXACT:
        return f"an untrained adapter changes the logits by {off:.1e}"
    losses = _train(model)
    if not losses[-1] < losses[0]:
        return f"the loss does not fall: {losses[0]:.4f}, {losses[-1]:.4f}"
    model.eval()
    adapted = model(TOKENS)
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(model, Path(folder) / "adapter")
        again: Any = build(name)
        attach_adapter(again, load_adapter(Path(folder) / "adapter"))
    if (off := _off(again(TOKENS), adapted)) > EXACT:
        return f"loaded, logits are off by {off:.1e}"
    fuse_dora(again)
    off = _off(again(TOKENS), adapted)
    return "" if off < BOUND else f"fused, logits are off by {off:.1e}"


def _off(found: mx.array, expected: mx.array) -> float:
    """Largest difference, relative to the largest logit."""
    difference = mx.abs(found - expected).max().item()
    return float(difference) / float(mx.abs(expected).max().item())  # pyright: ignore[reportArgumentType]


def _train(model: Any) -> list[float]:
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
