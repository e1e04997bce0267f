"""Ten steps of training with kernels and with plain MLX, and the losses of both.

    python .ci/ten_steps.py OUTPUT.json [--model FOLDER] [--steps 10]

Without `--model`, this trains the demo's SmolLM2-135M in bfloat16 (a download of 93
MB). On a CPU, where no kernel runs, both runs are plain MLX in float32. Exits with 1 if
a loss is not finite or the losses differ by more than 2 %.
"""

import mlx_dora  # isort: skip - loads OpenBLAS, so before mlx

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from mlx_dora import DoRAConfig, TrainConfig, finetune, load
from mlx_dora.data.loading import load_datasets
from mlx_dora.demo.data import write_demo_data
from mlx_dora.demo.model import demo_model
from mlx_dora.kernels.dispatch import SWITCH, device_backend

ALLOWED = 0.02
"""Relative difference of the losses of two runs, one by kernels."""


def train(
    model: str, data: Path, adapter: Path, mode: str, steps: int
) -> dict[str, Any]:
    """Train in a fresh model, and return its losses and seconds."""
    os.environ[SWITCH] = mode
    loaded, tokenizer = load(model)
    settings = TrainConfig(
        model=model,
        data=str(data),
        iters=steps,
        batch_size=4,
        max_seq_length=128,
        learning_rate=5e-4,
        steps_per_report=1,
        val_batches=2,
        steps_per_eval=steps,
        save_every=steps,
        seed=0,
    )
    sets = load_datasets(settings, tokenizer, ("train", "valid"))
    began = time.perf_counter()
    report = finetune(
        loaded,
        tokenizer,
        sets["train"],
        sets["valid"],
        train=settings,
        dora=DoRAConfig(rank=8, scale=2.0, num_layers=4),
        adapter_path=adapter,
    )
    losses = [r.train_loss for r in report.history if r.train_loss is not None]
    return {
        "mode": mode,
        "losses": losses,
        "val_loss": report.val_loss,
        "seconds": round(time.perf_counter() - began, 2),
        "peak_memory_bytes": report.peak_memory_bytes,
    }


def main() -> int:
    """Train three times, and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    backend = device_backend()
    dtype = "float32" if backend == "reference" else "bfloat16"
    model = options.model or str(demo_model(dtype=dtype))
    with tempfile.TemporaryDirectory() as work:
        data = Path(work) / "data"
        write_demo_data(data)
        modes = ("reference", backend, "auto")
        runs = [
            train(model, data, Path(work) / str(number), mode, options.steps)
            for number, mode in enumerate(modes)
        ]
    first = runs[0]["losses"]
    worst = max(
        abs(a - b) / b
        for run in runs[1:]
        for a, b in zip(run["losses"], first, strict=True)
    )
    is_right = worst <= ALLOWED and len(first) == options.steps  # false for NaN
    result = {
        "mlx_dora": mlx_dora.__version__,
        "backend": backend,
        "runs": runs,
        "worst_difference": worst,
        "is_right": is_right,
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(
        f"{options.steps} steps on {backend}: losses {first[0]:.4f} to {first[-1]:.4f}"
    )
    for run in runs:
        print(
            f"  {run['mode']:9} {run['seconds']:6.1f} s, last {run['losses'][-1]:.4f}"
        )
    print(f"  worst difference {worst:.1e}: {'right' if is_right else 'WRONG'}")
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main())
