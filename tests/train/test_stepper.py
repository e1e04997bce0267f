from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.checks import assert_close, to_numpy
from tests.train.saved import tensors

Run = Callable[..., Any]


def test_long_gradients_are_cut_to_the_norm(run: Run) -> None:
    settings = {"iters": 1, "optimizer": "sgd", "learning_rate": 1.0}
    moved = {}
    for limit in (None, 1e-3):
        model, report = run(f"clip{limit}", max_grad_norm=limit, **settings)
        del model
        _, start = run(f"from{limit}", iters=1, learning_rate=1e-30, optimizer="sgd")
        before = tensors(start.adapter_path)
        after = tensors(report.adapter_path)
        moved[limit] = {n: to_numpy(after[n]) - to_numpy(before[n]) for n in after}
    length = np.sqrt(sum(np.square(one).sum() for one in moved[1e-3].values()))
    assert length == pytest.approx(1e-3, rel=1e-3)
    whole = np.sqrt(sum(np.square(one).sum() for one in moved[None].values()))
    for name, value in moved[1e-3].items():
        assert np.abs(value * whole / 1e-3 - moved[None][name]).max() < 1e-3 * whole


def test_lora_plus_stretches_the_steps_of_b_alone(run: Run) -> None:
    settings = {"iters": 1, "optimizer": "adam", "learning_rate": 1e-3}
    _, plain = run("plain", **settings)
    _, plus = run("plus", lora_plus_ratio=16.0, **settings)
    ones, others = tensors(plain.adapter_path), tensors(plus.adapter_path)
    for name, value in ones.items():
        factor = 16.0 if name.endswith("lora_b") else 1.0  # B starts at 0
        assert_close(others[name], factor * to_numpy(value), bound=1e-6)
