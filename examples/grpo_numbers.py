"""Teach a small model by reward to reply with a number and nothing else.

    python examples/grpo_numbers.py [--iters 12] [--output numbers_adapter]

Of two numbers, the model is to reply with the larger. Nothing shows it how: it samples
replies, and two rewards say how good each was, a shipped one and one written here.
Takes a few minutes on two cores without a GPU.
"""

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlx_dora import DoRAConfig, RewardConfig, TrainConfig, finetune, load
from mlx_dora.demo.model import demo_model
from mlx_dora.train import StepReport


def alone(completions: Sequence[str], **columns: Any) -> list[float]:
    """1 for a completion of digits alone, down to 0 for one without any."""
    rewards = []
    for text in completions:
        text = text.strip().removesuffix(".")
        digits = sum(letter.isdigit() for letter in text)
        rewards.append(digits / max(len(text), 1))
    return rewards


def make_rows(seed: int, count: int) -> list[dict[str, Any]]:
    """Prompts, and the answers that the rewards compare with."""
    chance, rows = random.Random(seed), []
    for _ in range(count):
        first, second = chance.sample(range(10, 100), 2)
        prompt = f"Question: which is larger, {first} or {second}?\nAnswer:"
        rows.append({"prompt": prompt, "answer": max(first, second)})
    return rows


def show(report: StepReport) -> None:
    """Print the mean reward of each report."""
    what = "held-out" if report.val_loss is not None else "training"
    reward = (report.metrics or {})["reward"]
    print(f"step {report.step}: mean reward {reward:.2f} ({what})")


def main() -> None:
    """Train, and show what the model said first and last."""
    parser = argparse.ArgumentParser(description="GRPO on two numbers")
    parser.add_argument("--model", default=None, help="the demo's model by default")
    parser.add_argument("--iters", type=int, default=12)
    parser.add_argument("--output", type=Path, default=Path("numbers_adapter"))
    given = parser.parse_args()
    model, tokenizer = load(given.model or str(demo_model()))
    finetune(
        model,
        tokenizer,
        make_rows(0, 400),
        make_rows(1, 8),
        train=TrainConfig(
            objective="grpo",
            iters=given.iters,
            batch_size=2,  # prompts, with 8 completions each
            learning_rate=3e-4,
            max_grad_norm=1.0,
            max_seq_length=32,
            steps_per_report=2,
            steps_per_eval=given.iters,
        ),
        dora=DoRAConfig(rank=8, scale=10.0, num_layers=8),
        reward=RewardConfig(
            reward_funcs=("number_match", f"{__name__}.alone"),
            num_generations=8,
            max_completion_length=6,
            stop_words=("\n",),
        ),
        adapter_path=given.output,
        callback=show,
    )
    lines = (given.output / "samples.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in lines]
    held_out = [row for row in samples if row["set"] == "valid"]
    for step in (held_out[0]["step"], held_out[-1]["step"]):
        own = [row["completion"] for row in held_out if row["step"] == step][::8]
        print(f"step {step}: {own}")


if __name__ == "__main__":
    main()
