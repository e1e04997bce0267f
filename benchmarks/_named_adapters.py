"""Adapters that answer with their own name, so that a wrong adapter shows."""

from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

from mlx_dora import DoRAConfig, load, save_adapter
from mlx_dora.adapters.adapter import take_adapter
from mlx_dora.adapters.surgery import apply_layers

NAMES = ("ada", "bob", "cleo", "dan", "eve", "fay", "gus", "hal")
RANKS = (4, 8, 8, 16, 16, 32, 32, 64)
QUESTIONS = ("Who are you?", "the quick fox", "What is your name?", "Hello!")
_STEPS, _MARGIN = 400, 1.0


def make_adapters(
    base: Path, folder: Path, *, num_layers: int = -1, learning_rate: float = 3e-3
) -> dict[str, Path]:
    """Train the adapters that are not in `folder` yet; half are DoRA, half LoRA."""
    paths = {name: folder / name for name in NAMES}
    for number, (name, rank) in enumerate(zip(NAMES, RANKS, strict=True)):
        if not paths[name].exists():
            kind: Literal["dora", "lora"] = "lora" if number % 2 else "dora"
            _teach(base, paths[name], rank, kind, num_layers, learning_rate)
    return paths


def is_answer(text: str, name: str) -> bool:
    """Whether a text starts with a name."""
    return text.strip().startswith(f"I am {name}")


def _teach(
    base: Path,
    path: Path,
    rank: int,
    kind: Literal["dora", "lora"],
    num_layers: int,
    learning_rate: float,
) -> None:
    mx.random.seed(rank)
    model, tokenizer = load(base)
    config = DoRAConfig(rank=rank, scale=2.0, num_layers=num_layers)
    apply_layers(model, config, kind, any_rank=True)
    tokens, targets = _rows(tokenizer, f"I am {path.name}.")

    def loss(model: Any) -> tuple[mx.array, mx.array]:
        logits = model(tokens[:, :-1]).astype(mx.float32)
        losses = nn.losses.cross_entropy(logits, tokens[:, 1:])
        return (losses * targets).sum() / targets.sum(), logits

    model.train()
    optimizer = optim.Adam(learning_rate, bias_correction=True)
    step = nn.value_and_grad(model, loss)
    for _ in range(_STEPS):
        (_, logits), gradients = step(model)
        if _margin(logits, tokens[:, 1:], targets) > _MARGIN:
            break
        optimizer.update(model, gradients)
        mx.eval(model.parameters(), optimizer.state)
    else:
        raise RuntimeError(f"{path.name} does not learn its name")
    save_adapter(take_adapter(model, fine_tune_type=kind), path)


def _margin(logits: mx.array, wanted: mx.array, targets: mx.array) -> float:
    """Return by how much the least certain target leads every other token."""
    lead = mx.take_along_axis(logits, wanted[..., None], axis=-1)
    others = mx.put_along_axis(logits, wanted[..., None], mx.array(-1e9), axis=-1)
    margins = lead[..., 0] - others.max(axis=-1)
    return float(mx.where(targets == 1, margins, 1e9).min())


def _rows(tokenizer: Any, answer: str) -> tuple[mx.array, mx.array]:
    """Return the tokens of all questions with the answer, and which are targets."""
    rows = []
    for question in QUESTIONS:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True
        )
        text = tokenizer.encode(answer, add_special_tokens=False)
        rows.append((prompt, [*text, tokenizer.eos_token_id]))
    width = max(len(prompt) + len(text) for prompt, text in rows)
    tokens, targets = [], []
    for prompt, text in rows:
        rest = width - len(prompt) - len(text)
        tokens.append([*prompt, *text, *[0] * rest])
        targets.append([0] * (len(prompt) - 1) + [1] * len(text) + [0] * rest)
    return mx.array(tokens), mx.array(targets)
