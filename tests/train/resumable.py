"""A training in its own process, which tests can kill.

Run ``python -m tests.train.resumable FOLDER JSON``. The JSON object holds fields of
`TrainConfig` and four more. ``dropout`` is the adapter's. ``preference`` holds fields
of `PreferenceConfig`. ``die`` names a moment in
the writing of a checkpoint, and the occurrence at which the process kills itself.
``largest_file`` is the file size in bytes at which the system stops a write.
"""

import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.models import llama

from mlx_dora import DoRAConfig
from mlx_dora.io import atomic
from mlx_dora.train import TrainConfig, finetune
from mlx_dora.train.objectives.config import PreferenceConfig
from mlx_dora.train.run import checkpoint
from tests.train.conftest import EXAMPLES, ExampleSet

SETTINGS: dict[str, Any] = {
    "iters": 24,
    "batch_size": 2,
    "learning_rate": 1e-2,
    "grad_accumulation_steps": 2,
    "steps_per_report": 3,
    "steps_per_eval": 6,
    "save_every": 4,
    "seed": 5,
    "lr_schedule": {"name": "cosine_decay", "arguments": [1e-2, 12], "warmup": 3},
}


def kill_at(moment: str, count: int) -> None:
    """Kill the process at the `count`-th occurrence of a moment in a write."""
    seen = 0

    def dying(function: Callable[..., Any], *, after: bool) -> Callable[..., Any]:
        def call(*arguments: Any, **settings: Any) -> Any:
            nonlocal seen
            seen += 1
            if seen == count and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*arguments, **settings)
            if seen == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    owner, name, after = {
        "weights written": (checkpoint, "write_tensors", True),
        "before state": (checkpoint, "write_text", False),
        "before rename": (atomic, "put_in_place", False),
        "after rename": (atomic, "put_in_place", True),
        "before prune": (checkpoint, "_folders", False),
    }[moment]
    setattr(owner, name, dying(getattr(owner, name), after=after))


def main(folder: Path, settings: dict[str, Any]) -> None:
    die = settings.pop("die", None)
    if die:
        kill_at(*die)
    dropout = settings.pop("dropout", 0.2)
    largest = settings.pop("largest_file", None)
    if largest:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    mx.random.seed(11)
    model = llama.Model(
        llama.ModelArgs(
            model_type="llama",
            hidden_size=32,
            num_hidden_layers=2,
            intermediate_size=48,
            num_attention_heads=4,
            rms_norm_eps=1e-5,
            vocab_size=64,
        )
    )
    mx.eval(model.parameters())

    def announce(phase: str, _total: int, _new: int) -> None:
        if phase == "train":
            sys.stdout.write("step\n")
            sys.stdout.flush()

    rows: tuple[Any, Any] = (EXAMPLES, EXAMPLES[:4])
    preference = settings.pop("preference", None)
    if settings.get("objective", "sft") != "sft":
        rows = (ExampleSet(), ExampleSet())
    finetune(
        model,
        None,
        *rows,
        train=TrainConfig(**{**SETTINGS, **settings}),
        dora=DoRAConfig(rank=4, scale=2.0, num_layers=-1, dropout=dropout),
        adapter_path=folder,
        progress=announce,
        preference=PreferenceConfig(**preference) if preference else None,
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
