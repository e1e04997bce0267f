"""The loop beside mlx-lm's own, on its batches and with its loss."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest

from mlx_dora.train.run.start import trainable_tensors
from tests.checks import assert_close, to_numpy
from tests.train.conftest import EXAMPLES
from tests.train.saved import tensors

STEPS = 20
# mlx-lm's own rule for what a rank-4 adapter of these looks like.
PARAMETERS = {
    "rank": 4,
    "scale": 2.0,
    "dropout": 0.0,
    "keys": ["self_attn.q_proj", "mlp.up_proj"],
}


def host_batches(*_: Any, **__: Any) -> Iterator[Any]:
    from mlx_lm.tuner.trainer import iterate_batches

    return iterate_batches(list(EXAMPLES), 4, 2048, loop=True, seed=3)


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_losses_and_weights_are_those_of_mlx_lm(
    run: Callable[..., Any],
    make_tiny_model: Callable[..., nn.Module],
    tmp_path: Path,
    use_dora: bool,
    optimizer: str,
) -> None:
    from mlx_lm.tuner import trainer
    from mlx_lm.tuner.callbacks import TrainingCallback
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model = make_tiny_model()
    model.freeze()
    linear_to_lora_layers(model, 2, PARAMETERS, use_dora=use_dora)
    start = tmp_path / "start.safetensors"
    mx.save_safetensors(str(start), trainable_tensors(model))
    theirs: list[float] = []

    class Record(TrainingCallback):
        def on_train_loss_report(self, train_info: dict) -> None:
            theirs.append(train_info["train_loss"])

    rate = {"sgd": 0.1, "adam": 1e-3}[optimizer]
    kinds = {"sgd": optim.SGD, "adam": optim.Adam}
    trainer.train(
        model,
        kinds[optimizer](learning_rate=rate),
        EXAMPLES,
        args=trainer.TrainingArgs(
            batch_size=4,
            iters=STEPS,
            steps_per_report=1,
            steps_per_save=1000,
            adapter_file=str(tmp_path / "theirs.safetensors"),
        ),
        iterate_batches=host_batches,
        training_callback=Record(),
    )

    _, report = run(
        fine_tune_type="dora" if use_dora else "lora",
        keys=tuple(PARAMETERS["keys"]),
        iters=STEPS,
        steps_per_report=1,
        optimizer=optimizer,
        learning_rate=rate,
        resume_adapter_file=str(start),
        options={"loss": trainer.default_loss, "batches": host_batches},
    )
    ours = [one.train_loss for one in report.history]
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert ours[-1] < ours[0]
    expected = trainable_tensors(model)
    begun = mx.load(str(start))
    assert isinstance(begun, dict)
    for name, value in tensors(report.adapter_path).items():
        moved = to_numpy(expected[name]) - to_numpy(begun[name])
        assert np.abs(moved).max() > 0
        # Adam divides by its own small numbers: rounding grows a little with it.
        bound = 1e-3 if optimizer == "adam" else 1e-4
        assert_close(value - begun[name], moved, bound=bound)
