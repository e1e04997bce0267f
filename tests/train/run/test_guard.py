"""Bad steps, and the best one."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_dora import load_adapter, remove_dora
from mlx_dora.adapters.attach import attach_adapter
from mlx_dora.data.batches import pad_batch
from mlx_dora.errors import DoRAError
from mlx_dora.evaluate.loss import evaluate_loss, loss_fn
from tests.train.conftest import EXAMPLES
from tests.train.saved import config, log, same_bits, tensors

Run = Callable[..., Any]


def spoilt(step: int) -> dict[str, Any]:
    """Batches of two rows, of one row at `step`, and a loss that is NaN on that one."""

    def loss(model: nn.Module, batch: mx.array, lengths: mx.array) -> Any:
        value, tokens = loss_fn(model, batch, lengths)
        return value * (mx.nan if batch.shape[0] == 1 else 1.0), tokens

    def batches(*_: Any, **__: Any) -> Iterator[Any]:
        for number in range(1, 7):
            yield pad_batch(EXAMPLES[: 1 if number == step else 2], 2048)

    return {"loss": loss, "batches": batches}


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_adapter(
    run: Run, tmp_path: Path
) -> None:
    with pytest.raises(DoRAError, match="the loss was not finite in 1 steps in a row"):
        run(iters=6, save_every=2, max_bad_steps=1, options=spoilt(4))
    saved = tensors(tmp_path / "adapter")
    assert all(mx.all(mx.isfinite(value)).item() for value in saved.values())
    assert config(tmp_path / "adapter")["mlx_dora"]["training"]["steps"] == 2


def test_a_bad_step_changes_nothing_and_is_counted(run: Run) -> None:
    # The other five batches are all the same.
    _, spared = run("spared", iters=6, options=spoilt(4), learning_rate=1e-2)
    _, plain = run("plain", iters=5, options=spoilt(0), learning_rate=1e-2)
    assert same_bits(tensors(spared.adapter_path), tensors(plain.adapter_path))
    assert (spared.steps_skipped, plain.steps_skipped) == (1, 0)
    assert spared.trained_tokens == plain.trained_tokens
    assert log(spared.adapter_path)[-1]["skipped_steps"] == 1
    assert spared.train_loss == pytest.approx(plain.train_loss)


def test_a_batch_without_a_target_changes_nothing(run: Run) -> None:
    def batches(empty: int) -> Callable[..., Iterator[Any]]:
        def make(*_: Any, **__: Any) -> Iterator[Any]:
            for number in range(1, 7):
                tokens, lengths = pad_batch(EXAMPLES[:2], 2048)
                yield (
                    tokens,
                    (lengths[:, 1:] + mx.zeros_like(lengths))
                    if (number == empty)
                    else lengths,
                )

        return make

    _, spared = run("spared", iters=6, options={"batches": batches(3)})
    _, plain = run("plain", iters=5, options={"batches": batches(0)})
    assert same_bits(tensors(spared.adapter_path), tensors(plain.adapter_path))
    assert spared.steps_skipped == 1


def test_the_best_adapter_is_kept_and_no_better_ones_end_the_training(run: Run) -> None:
    # Far too high a rate: the validation loss turns back up.
    settings = {"learning_rate": 0.3, "steps_per_eval": 2, "valid": EXAMPLES[:4]}
    model, report = run(iters=60, early_stop=3, **settings)
    losses = {
        one.step: one.val_loss for one in report.history if one.val_loss is not None
    }
    best = min(losses, key=lambda step: losses[step])
    assert report.best_step == best
    assert report.steps == best + 6 < 60
    remove_dora(model)
    attach_adapter(model, load_adapter(report.adapter_path / "best"))
    assert evaluate_loss(model, EXAMPLES[:4]).loss == pytest.approx(
        losses[best], rel=1e-6
    )


def test_a_training_that_ends_in_norms_beyond_float32_is_not_saved(
    run: Run, tmp_path: Path
) -> None:
    with pytest.raises(DoRAError, match="norms of the adapted rows are not finite"):
        run(iters=3, learning_rate=1e30)
    assert not (tmp_path / "adapter" / "adapters.safetensors").exists()
