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
