"""Run study 2 of ``docs/studies/when.md``, as far as it is not done: GRPO.

    python benchmarks/when/reward.py
    python benchmarks/when/reward.py --repeat 2

Each run is a line of ``benchmarks/results/when_reward.jsonl``, written when it ends.
The task: of four numbers between 100 and 999, reply with the largest and nothing else.
Each method's learning rate is chosen from three by a run with a separate seed; then
five seeds run at that rate. Runs use one thread. ``--repeat`` repeats runs drawn at
random, and fails if a bit differs.
"""

import os
import sys
from pathlib import Path

os.environ["OPENBLAS_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))

import _harness as bench  # isort: skip - OpenBLAS before mlx

import hashlib
import logging
import random
import tempfile
import time
from dataclasses import asdict, replace
from typing import Any

import click
import mlx.core as mx
import numpy as np
from _machine import describe_machine
from mlx.utils import tree_flatten
from reward_grid import CHOOSING_SEED, Job, jobs, read
from run import append_line
from train import apply_direction, copy_model

from mlx_dora.adapters.config import DoRAConfig
from mlx_dora.adapters.hosting import load
from mlx_dora.data.loading import as_dataset
from mlx_dora.demo.model import demo_model
from mlx_dora.evaluate.loss import eval_mode
from mlx_dora.train.config import TrainConfig
from mlx_dora.train.grpo.advantages import total_rewards
from mlx_dora.train.grpo.config import RewardConfig
from mlx_dora.train.grpo.generation import Generator
from mlx_dora.train.objectives.grpo import Grpo
from mlx_dora.train.run.finetune import finetune

RESULTS = Path(__file__).parents[1] / "results" / "when_reward.jsonl"
PROMPTS = {"train": 400, "valid": 64, "test": 64}
REWARD = RewardConfig(
    reward_funcs=("regex_match", "number_match"),
    reward_weights=(0.5, 0.5),
    reward_arguments={"regex_match": {"pattern": "[0-9]{3}[.]?"}},
    num_generations=8,
    max_completion_length=6,
    stop_words=("\n",),
)
UPDATES, BATCH, BLOCKS, RANK, SCALE = 24, 2, 8, 8, 10.0


def prompts(seed: int, count: int) -> list[dict[str, Any]]:
    """Prompts of the task with their answers."""
    chance, made = random.Random(seed), []
    for _ in range(count):
        *first, last = numbers = chance.sample(range(100, 1000), 4)
        question = f"which is the largest, {', '.join(map(str, first))} or {last}?"
        prompt = f"Question: {question}\nAnswer:"
        made.append({"prompt": prompt, "answer": max(numbers)})
    return made


class Bench:
    """The model and the prompts."""

    def __init__(self, model: Path, updates: int = UPDATES) -> None:
        self._model, self._tokenizer = load(model)
        self._updates = updates
        self._objective = Grpo(replace(REWARD, top_k=1, num_generations_eval=1))
        self._prompts = {
            split: prompts(number, count)
            for number, (split, count) in enumerate(PROMPTS.items(), 1)
        }
        self._machine = describe_machine()
        self.untrained = {
            split: self._rewards(self._model, split) for split in ("valid", "test")
        }

    def run(self, job: Job) -> dict[str, Any]:
        """Train and measure."""
        model, start = copy_model(self._model), time.process_time()
        report = self._train(model, job)
        result: dict[str, Any] = {
            **asdict(job),
            "trainable": report.trainable_parameters,
            "skipped_steps": report.steps_skipped,
            "curve": [
                round(entry.metrics["reward"], 4)
                for entry in report.history
                if entry.metrics and entry.train_loss is not None
            ],
            "untrained_reward": float(self.untrained["test"].mean()),
            "valid_reward": float(self._rewards(model, "valid").mean()),
            "digest": _digest(model),
        }
        if job.seed != CHOOSING_SEED:
            result["rewards"] = self._rewards(model, "test").tolist()
        return {
            **result,
            "cpu_seconds": round(time.process_time() - start, 1),
            "nice": os.nice(0),
            "blas": bench.BLAS.state,
            **self._machine,
        }

    def _train(self, model: Any, job: Job) -> Any:
        kind = job.method if job.method in ("lora", "full") else "dora"
        dora = DoRAConfig(rank=RANK, scale=SCALE, num_layers=BLOCKS)
        if job.method == "magnitude":
            dora = replace(dora, variant="magnitude")
        if job.method == "direction":
            apply_direction(model, dora, job.seed)
        with tempfile.TemporaryDirectory() as folder:
            return finetune(
                model,
                self._tokenizer,
                self._prompts["train"],
                None,
                train=TrainConfig(
                    objective="grpo",
                    fine_tune_type=kind,
                    seed=job.seed,
                    iters=self._updates,
                    batch_size=BATCH,
                    learning_rate=job.rate,
                    max_grad_norm=1.0,
                    max_seq_length=64,
                    steps_per_report=1,
                    save_every=self._updates,
                    val_batches=0,
                    memory_limit=0,  # whatever else runs here
                ),
                dora=dora,
                adapter_path=Path(folder) / "adapter",
                reward=REWARD,
                callback=lambda _: None,
            )

    def _rewards(self, model: Any, split: str) -> np.ndarray:
        """Reward of the greedy completion of each prompt."""
        asked, objective = self._prompts[split], self._objective
        data = as_dataset(
            asked,
            self._tokenizer,
            TrainConfig(objective="grpo"),
            split,
            objective.dataset,
        )
        generator = Generator(
            model, self._tokenizer, objective.rewards, objective.config
        )
        with eval_mode(model):
            made = generator.generate(data, range(len(asked)), [0], 1)
        return total_rewards(made.rewards, objective.config)


def _digest(model: Any) -> str:
    """Hash of the bits of the trained weights."""
    total = hashlib.sha256()
    for name, value in sorted(tree_flatten(model.trainable_parameters())):
        total.update(name.encode())
        total.update(np.array(value).tobytes())
    return total.hexdigest()[:16]


@click.command(help=__doc__)
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS)
@click.option("--repeat", type=int, help="Repeat this many runs instead.")
@click.option("--most", type=int, help="Stop after this many runs.")
def main(results: Path, repeat: int | None, most: int | None) -> None:
    mx.disable_compile()  # compiling takes as long as a run
    logging.disable(logging.WARNING)
    done, bench_ = read(results), Bench(demo_model())
    if repeat:
        for job in random.Random(0).sample(sorted(done, key=repr), repeat):
            is_same = bench_.run(job)["digest"] == done[job]["digest"]
            click.echo(f"{job}: {'the same bits' if is_same else 'DIFFERENT'}")
            if not is_same:
                raise SystemExit(1)
        return
    for number, job in enumerate(jobs(done)):
        if number == most:
            break
        done[job] = bench_.run(job)
        append_line(results, done[job])
        click.echo(
            f"{job.method} rate {job.rate:.3g} seed {job.seed}: valid "
            f"{done[job]['valid_reward']:.3f}, {done[job]['cpu_seconds']} s",
            err=True,
        )


if __name__ == "__main__":
    main()
