"""Peak memory and time of a step of each preference objective and GRPO, against SFT's.

    python benchmarks/preference_memory.py

SmolLM2-135M with every linear layer of every block adapted. Each objective makes a few
steps on the same rows of tokens: as 4 pairs, as 8 labeled answers, and for SFT as 8
rows whose answers alone are targets; GRPO samples 8 completions of one prompt, as long
as these answers unless the model ends them earlier. The script runs each in a process
of its own, so that no cache is shared, and prints one JSON line: peak bytes with the
model's own, the median seconds of a step after the first (DPO's with the reference's
pass, GRPO's with the sampling), wall and CPU, and the ratios to SFT's.
"""

import _harness as bench  # isort: skip - OpenBLAS before mlx

import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from typing import Any

import click
import mlx.core as mx
from _machine import describe_machine

from mlx_dora.adapters.config import DoRAConfig
from mlx_dora.adapters.hosting import load
from mlx_dora.data.dataset import RowDataset
from mlx_dora.data.targets import Example
from mlx_dora.demo.model import demo_model
from mlx_dora.train.config import TrainConfig
from mlx_dora.train.grpo.config import RewardConfig
from mlx_dora.train.objectives.config import PreferenceConfig
from mlx_dora.train.run.finetune import finetune

OBJECTIVES = ("sft", "dpo", "dpo full", "kto", "orpo", "simpo", "grpo")
ROWS = 8


class Rows(RowDataset):
    """Rows of one length: a prompt of a quarter, and an answer."""

    def __init__(self, length: int) -> None:
        self._length = length

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int, /) -> Example:
        first = self._length // 4
        words = [(7 * place + index * (place >= first)) % 40_000 + 100
                 for place in range(self._length)]  # fmt: skip
        return words, first

    def label(self, index: int) -> bool:
        """Half of the rows are desirable."""
        return index % 2 == 0


def sampled(length: int) -> tuple[list[dict[str, str]], RewardConfig]:
    """Prompts of about a quarter of `length` tokens, and completions of the rest."""
    first = length // 4
    rows = [{"prompt": "one " * first, "answer": "two"} for _ in range(ROWS)]
    return rows, RewardConfig(
        reward_funcs=("exact_match",),
        num_generations=ROWS,
        max_completion_length=length - first,
    )


def step(name: str, length: int, steps: int) -> dict[str, Any]:
    """Train a few steps; return bytes of the model and the peak, and the seconds."""
    objective, *kind = name.split()
    model, tokenizer = load(str(demo_model()))
    mx.eval(model.parameters())
    mx.clear_cache()
    held = mx.get_active_memory()
    units = {"kto": ROWS, "sft": ROWS, "grpo": 1}.get(objective, ROWS // 2)
    clock: list[float] = []
    rows, reward = sampled(length) if objective == "grpo" else (Rows(length), None)
    with tempfile.TemporaryDirectory() as folder:
        report = finetune(
            model,
            tokenizer,
            rows,
            None,
            train=TrainConfig(
                objective=objective,  # pyright: ignore[reportArgumentType]
                fine_tune_type="full" if kind else "dora",
                iters=steps,
                batch_size=units,
                steps_per_report=1,
                learning_rate=1e-5,
            ),
            dora=DoRAConfig(rank=8, scale=10.0, num_layers=4 if kind else -1),
            preference=PreferenceConfig(),
            reward=reward,
            adapter_path=f"{folder}/adapter",
            callback=lambda _: clock.append(time.process_time()),
        )
    cpu = [after - before for before, after in pairwise(clock)]
    rates = [one.steps_per_second or math.inf for one in report.history]
    seconds = statistics.median(1 / rate for rate in rates[1:] or rates)
    return {"name": name, "model": held, "peak": report.peak_memory_bytes,
            "seconds": seconds, "cpu": statistics.median(cpu or [0]),
            "tokens": report.trained_tokens,
            "loss": report.train_loss}  # fmt: skip


@click.command()
@click.option("--only", default=None, help="One objective, in this process.")
@click.option("--length", default=129, help="Tokens of a row.")
@click.option("--steps", default=3)
@click.option("--objective", "chosen", multiple=True, default=OBJECTIVES)
@click.option("--smoke", is_flag=True, help="One short step of SFT and of DPO.")
def main(only: str | None, length: int, steps: int, chosen: tuple[str, ...],
         smoke: bool) -> None:  # fmt: skip
    """Measure every objective, each in a process of its own."""
    names = OBJECTIVES[:2] if smoke else chosen
    length, steps = (9, 1) if smoke else (length, steps)
    if only is not None:
        print(json.dumps(step(only, length, steps)))
        return
    found = {}
    for name in names:
        words = [sys.executable, __file__, "--only", name, "--length", str(length),
                 "--steps", str(steps)]  # fmt: skip
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        found[name] = json.loads(done.stdout.splitlines()[-1])
    base = found["sft"]
    print(json.dumps({
        "bench": "preference_memory", **describe_machine(), "rows": ROWS,
        "length": length, "model_bytes": found["sft"]["model"],
        "peak_bytes": {name: one["peak"] for name, one in found.items()},
        "step_seconds": {name: round(one["seconds"], 2) for name, one in found.items()},
        "step_cpu_seconds": {name: round(one["cpu"], 2) for name, one in found.items()},
        "cpu_of_sft": {name: round(one["cpu"] / base["cpu"], 3) if base["cpu"] else None
                       for name, one in found.items()},
        "of_sft": {name: round(one["peak"] / base["peak"], 4)
                   for name, one in found.items()},
        "seconds_of_sft": {name: round(one["seconds"] / base["seconds"], 3)
                           for name, one in found.items()},
    }))  # fmt: skip


if __name__ == "__main__":
    bench  # noqa: B018 - imported for OpenBLAS
    main()
