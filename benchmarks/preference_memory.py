"""Peak memory of a step of each objective of preferences, against SFT's.

    python benchmarks/preference_memory.py

SmolLM2-135M with every linear layer of every block adapted. Each objective makes a few
steps on the same rows of tokens: as 4 pairs, as 8 labeled answers, and for SFT as 8
rows whose answers alone are targets. The script runs each in a process of its own, so
that no cache is shared, and prints one JSON line: peak bytes above the model's own, and
the ratio to SFT's of all peak bytes.
"""

import _harness as bench  # isort: skip - OpenBLAS before mlx

import json
import subprocess
import sys
import tempfile
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
from mlx_dora.train.objectives.config import PreferenceConfig
from mlx_dora.train.run.finetune import finetune

OBJECTIVES = ("sft", "dpo", "dpo full", "kto", "orpo", "simpo")
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


def peak(name: str, length: int, steps: int) -> dict[str, Any]:
    """Train a few steps, and return the model's and the peak bytes."""
    objective, *kind = name.split()
    model, tokenizer = load(str(demo_model()))
    mx.eval(model.parameters())
    mx.clear_cache()
    held = mx.get_active_memory()
    units = ROWS // 2 if objective in ("dpo", "orpo", "simpo") else ROWS
    with tempfile.TemporaryDirectory() as folder:
        report = finetune(
            model,
            tokenizer,
            Rows(length),
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
            adapter_path=f"{folder}/adapter",
        )
    return {"name": name, "model": held, "peak": report.peak_memory_bytes,
            "loss": report.train_loss}  # fmt: skip


@click.command()
@click.option("--only", default=None, help="One objective, in this process.")
@click.option("--length", default=129, help="Tokens of a row.")
@click.option("--steps", default=2)
@click.option("--smoke", is_flag=True, help="One short step of SFT and of DPO.")
def main(only: str | None, length: int, steps: int, smoke: bool) -> None:
    """Measure every objective, each in a process of its own."""
    names = OBJECTIVES[:2] if smoke else OBJECTIVES
    length, steps = (9, 1) if smoke else (length, steps)
    if only is not None:
        print(json.dumps(peak(only, length, steps)))
        return
    found = {}
    for name in names:
        words = [sys.executable, __file__, "--only", name, "--length", str(length),
                 "--steps", str(steps)]  # fmt: skip
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        found[name] = json.loads(done.stdout.splitlines()[-1])
    base = found["sft"]["peak"]
    print(json.dumps({
        "bench": "preference_memory", **describe_machine(), "rows": ROWS,
        "length": length, "model_bytes": found["sft"]["model"],
        "peak_bytes": {name: one["peak"] for name, one in found.items()},
        "of_sft": {name: round(one["peak"] / base, 4) for name, one in found.items()},
    }))  # fmt: skip


if __name__ == "__main__":
    bench  # noqa: B018 - imported for OpenBLAS
    main()
