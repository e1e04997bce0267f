import sys
import types
from collections.abc import Callable
from typing import Any

import pytest

from mlx_dora.train import TrainReport
from mlx_dora.train import services as services_module


def test_services_and_callback_both_get_every_report(
    run: Callable[..., tuple[Any, TrainReport]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_lm.tuner import callbacks

    logged: list[tuple[int, dict[str, Any]]] = []
    started: dict[str, Any] = {}
    fake = types.ModuleType("wandb")
    fake.init = lambda **settings: started.update(settings)  # pyright: ignore[reportAttributeAccessIssue]
    fake.log = lambda told, step: logged.append((step, told))  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(callbacks, "wandb", fake)
    monkeypatch.setattr(services_module, "find_spec", lambda name: object())
    seen: list[Any] = []
    _, report = run(
        valid=[([1, 2, 3], 0)],
        iters=4,
        steps_per_report=2,
        report_to="WandB",
        project_name="p",
        callback=seen.append,
    )
    assert seen == list(report.history)
    assert [step for step, _ in logged] == [0, 2, 4, 4]
    assert logged[1][1]["train_loss"] == seen[1].train_loss
    assert logged[0][1]["val_loss"] == report.first_val_loss
    assert started["project"] == "p"
    assert started["config"]["learning_rate"] == 1e-2


def test_callback_object_of_mlx_lms_is_called_as_mlx_lm_calls_it(
    run: Callable[..., tuple[Any, TrainReport]],
) -> None:
    from mlx_lm.tuner.callbacks import TrainingCallback

    class Recorder(TrainingCallback):
        def __init__(self) -> None:
            self.told: list[tuple[str, dict[str, Any]]] = []

        def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
            self.told.append(("train", train_info))

        def on_val_loss_report(self, val_info: dict[str, Any]) -> None:
            self.told.append(("val", val_info))

    recorder = Recorder()
    _, report = run(
        valid=[([1, 2, 3], 0)], iters=4, steps_per_report=2, callback=recorder
    )
    assert [(kind, told["iteration"]) for kind, told in recorder.told] == [
        ("val", 0), ("train", 2), ("train", 4), ("val", 4)
    ]  # fmt: skip
    first, second = recorder.told[0][1], recorder.told[1][1]
    # The keys of mlx_lm.tuner.trainer.train.
    assert first.keys() >= {"iteration", "val_loss", "val_time"}
    assert second.keys() == {
        "iteration", "train_loss", "learning_rate", "iterations_per_second",
        "tokens_per_second", "trained_tokens", "peak_memory",
    }  # fmt: skip
    assert first["val_loss"] == report.first_val_loss
    assert first["val_time"] > 0
    assert second["train_loss"] == report.history[1].train_loss


def test_callback_that_cannot_be_called_is_a_mistake(
    run: Callable[..., tuple[Any, TrainReport]],
) -> None:
    with pytest.raises(TypeError, match="must be a function of a StepReport, or have"):
        run(callback=object())
