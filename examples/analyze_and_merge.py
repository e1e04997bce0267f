"""Analyze two adapters, ask what to do with them, and merge them.

    python examples/analyze_and_merge.py

The script trains two DoRA adapters of a tiny random model on two made-up tasks. It
prints what each adapter did to magnitude and direction, compares the two, merges them
as the comparison suggests, and checks the result on both tasks. If you have adapters
and a model of your own, start at "Analyze".
"""

from mlx_dora import DoRAConfig, load_adapter  # isort: skip - loads OpenBLAS, so before mlx

import tempfile
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models import llama

from mlx_dora.adapters.attach import attach_adapter
from mlx_dora.analyze import analyze_adapter, compare_adapters
from mlx_dora.merge import merge_adapters
from mlx_dora.train import TrainConfig, finetune


def tiny_model() -> nn.Module:
    mx.random.seed(0)
    return llama.Model(
        llama.ModelArgs(
            model_type="llama",
            hidden_size=32,
            num_hidden_layers=2,
            intermediate_size=64,
            num_attention_heads=4,
            rms_norm_eps=1e-5,
            vocab_size=64,
        )
    )


def task(step: int) -> list[list[int]]:
    """Make rows that count up by `step`, in the lower or upper half of the tokens."""
    first = 0 if step < 5 else 32
    return [[first + (s + step * i) % 32 for i in range(16)] for s in range(32)]


def train(rows: list[list[int]], folder: Path) -> None:
    finetune(
        tiny_model(),
        None,
        rows,
        None,
        train=TrainConfig(iters=60, batch_size=8, learning_rate=1e-3),
        dora=DoRAConfig(rank=4, scale=2.0, num_layers=-1),
        adapter_path=folder,
    )


def loss(adapter: Path | None, rows: list[list[int]]) -> float:
    model = tiny_model()
    if adapter is not None:
        attach_adapter(model, load_adapter(adapter))
    model.eval()
    tokens = mx.array(rows)
    logits = model(tokens[:, :-1])
    mean = nn.losses.cross_entropy(logits, tokens[:, 1:], reduction="mean")
    return float(np.array(mean))


def main() -> None:
    tasks = {"by three": task(3), "by seven": task(7)}
    with tempfile.TemporaryDirectory() as folder:
        adapters = [Path(folder) / name for name in tasks]
        for rows, adapter in zip(tasks.values(), adapters, strict=True):
            train(rows, adapter)

        # Analyze: the first matrices.
        analysis = analyze_adapter(adapters[0], tiny_model())
        for layer in analysis.layers[:4]:
            print(
                f"{layer.name}: ΔM {layer.delta_m:.4f}, ΔD {layer.delta_d:.4f}, "
                f"{layer.classification}, effective rank {layer.effective_rank:.1f}"
            )
        for advice in analysis.guidance:
            print(advice.sentence)

        # Compare, and merge as the comparison suggests.
        comparison = compare_adapters(adapters, tiny_model())
        for advice in comparison.guidance:
            print(advice.sentence)
        chosen = next((a for a in comparison.guidance if a.method), None)
        merged = Path(folder) / "merged"
        merge_adapters(
            adapters,
            model=tiny_model(),
            method=(chosen and chosen.method) or "slerp",
            weights=chosen.weights if chosen else None,
            save_path=merged,
        )
        for name, rows in tasks.items():
            before, after = loss(None, rows), loss(merged, rows)
            alone = loss(Path(folder) / name, rows)
            print(f"{name}: loss {before:.2f}, merged {after:.2f}, alone {alone:.2f}")
            assert after < before, "the merged adapter knows neither task"


if __name__ == "__main__":
    main()
