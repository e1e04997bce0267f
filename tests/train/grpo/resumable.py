"""A GRPO training in its own process, which tests can kill.

Run ``python -m tests.train.grpo.resumable FOLDER JSON``. The JSON object holds fields
of `TrainConfig` and, under ``reward``, of `RewardConfig`.
"""

import json
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.models import llama

from mlx_dora import DoRAConfig
from mlx_dora.train import TrainConfig, finetune
from mlx_dora.train.grpo.config import RewardConfig
from tests.conftest import TINY_CONFIG
from tests.train.grpo.letters import PROMPTS, Letters

SETTINGS: dict[str, Any] = {
    "objective": "grpo",
    "iters": 16,
    "batch_size": 2,
    "learning_rate": 1e-2,
    "grad_accumulation_steps": 2,
    "steps_per_report": 3,
    "steps_per_eval": 6,
    "save_every": 4,
    "max_seq_length": 32,
    "seed": 1,
}
REWARD: dict[str, Any] = {
    "reward_funcs": (
        "tests.train.grpo.letters.parity",
        "tests.train.grpo.letters.length",
    ),
    "num_generations": 3,
    "max_completion_length": 5,
}


def main(folder: Path, settings: dict[str, Any]) -> None:
    reward = {**REWARD, **settings.pop("reward", {})}
    mx.random.seed(11)
    model = llama.Model(llama.ModelArgs.from_dict({**TINY_CONFIG, "vocab_size": 64}))
    mx.eval(model.parameters())

    def announce(phase: str, _total: int, _new: int) -> None:
        if phase == "train":
            sys.stdout.write("step\n")
            sys.stdout.flush()

    finetune(
        model,
        Letters(),
        PROMPTS,
        PROMPTS[:3],
        train=TrainConfig(**{**SETTINGS, **settings}),
        dora=DoRAConfig(rank=4, scale=2.0, num_layers=-1, dropout=0.2),
        adapter_path=folder,
        progress=announce,
        reward=RewardConfig(**reward),
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
