import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_dora import DoRAConfig, apply_dora, load_adapter
from mlx_dora.adapters.attach import attach_adapter
from mlx_dora.data.batches import pad_batch
from mlx_dora.errors import DoRAError
from mlx_dora.evaluate.loss import evaluate_loss, loss_fn
from mlx_dora.train import StepReport
from tests.checks import assert_close, to_numpy
from tests.train.conftest import EXAMPLES
from tests.train.saved import config, log, same_bits, tensors

Run = Callable[..., Any]


@pytest.mark.compiled
def test_overfits_a_tiny_model(run: Run) -> None:
    model, report = run(valid=EXAMPLES, iters=60)
    assert report.first_val_loss > 5.5
    assert report.val_loss < 0.45 * report.first_val_loss
    assert report.val_loss == pytest.approx(evaluate_loss(model, EXAMPLES).loss)
    assert not model.training
    assert not model.model.layers[0].self_attn.training


@pytest.mark.parametrize(
    ("kind", "bound"), [("dora", 0.8), ("lora", 0.95), ("full", 0.5)]
)
def test_each_kind_trains_and_mlx_lm_loads_it(
    run: Run, tiny_model_folder: Path, kind: str, bound: float
) -> None:
    from mlx_lm import load

    rate = 1e-3 if kind == "full" else 1e-2
    model, report = run(
        valid=EXAMPLES, iters=25, fine_tune_type=kind, learning_rate=rate
    )
    assert report.val_loss < bound * report.first_val_loss
    assert config(report.adapter_path)["fine_tune_type"] == kind
    loaded = load(str(tiny_model_folder), adapter_path=str(report.adapter_path))[0]
    tokens = mx.array([EXAMPLES[3][0]])
    assert_close(loaded(tokens), to_numpy(model(tokens)), bound=1e-5)


def test_full_trains_only_the_last_blocks(run: Run, tiny_model: nn.Module) -> None:
    before = dict(tree_flatten(tiny_model.parameters()))
    model, report = run(fine_tune_type="full", num_layers=1, learning_rate=1e-3)
    after = dict(tree_flatten(model.parameters()))
    changed = {n for n, v in after.items() if not mx.array_equal(v, before[n]).item()}
    assert changed == {n for n in before if n.startswith("model.layers.1.")}
    assert set(tensors(report.adapter_path)) == changed
    assert config(report.adapter_path)["num_layers"] == 1


@pytest.mark.compiled
def test_the_same_seed_gives_the_same_bits(run: Run) -> None:
    settings = {"dropout": 0.2, "iters": 6, "grad_accumulation_steps": 2}
    _, first = run("one", **settings)
    _, second = run("two", **settings)
    _, other = run("other", **settings, seed=1)
    assert same_bits(tensors(first.adapter_path), tensors(second.adapter_path))
    assert not same_bits(tensors(first.adapter_path), tensors(other.adapter_path))


def test_accumulated_small_batches_equal_a_large_batch(run: Run) -> None:
    # Batches of unequal token counts: a mean of means would differ.
    def batches(size: int) -> Callable[..., Iterator[Any]]:
        def make(*_: Any, **__: Any) -> Iterator[Any]:
            while True:
                for start in range(0, 8, size):
                    yield pad_batch(EXAMPLES[start : start + size], 2048)

        return make

    settings = {"optimizer": "sgd", "learning_rate": 0.1}
    _, large = run("large", iters=3, options={"batches": batches(8)}, **settings)
    _, small = run(
        "small",
        iters=12,
        grad_accumulation_steps=4,
        options={"batches": batches(2)},
        **settings,
    )
    expected = tensors(large.adapter_path)
    for name, value in tensors(small.adapter_path).items():
        assert_close(value, to_numpy(expected[name]), bound=1e-5)
    assert small.trained_tokens == large.trained_tokens


def test_the_last_incomplete_window_is_used(run: Run) -> None:
    _, five = run("five", iters=5, grad_accumulation_steps=4)
    _, four = run("four", iters=4, grad_accumulation_steps=4)
    assert five.steps == 5
    assert not same_bits(tensors(five.adapter_path), tensors(four.adapter_path))


def test_norms_are_computed_once_per_update(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_dora.layers import _layer

    calls = []
    plain = _layer.row_norm
    monkeypatch.setattr(
        _layer, "row_norm", lambda *a, **k: calls.append(1) or plain(*a, **k)
    )
    _, report = run(iters=8, grad_accumulation_steps=4, grad_checkpoint=True)
    # Once for the report and once when the adapter is saved, which checks them.
    assert len(calls) == (2 + 2) * len(report.modules)


@pytest.mark.parametrize(
    ("settings", "holds"),
    [
        ({}, False),
        ({"grad_checkpoint": True}, False),
        ({"grad_accumulation_steps": 2}, True),
    ],
)
def test_norms_are_held_only_where_they_are_used_again(
    run: Run, monkeypatch: pytest.MonkeyPatch, settings: dict, holds: bool
) -> None:
    from mlx_dora.train import stepper

    calls = []
    plain = stepper.held_norms
    monkeypatch.setattr(
        stepper, "held_norms", lambda model: calls.append(1) or plain(model)
    )
    run(iters=2, **settings)
    assert bool(calls) is holds


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.compiled
def test_held_norms_train_like_recomputed_norms(
    run: Run, monkeypatch: pytest.MonkeyPatch, checkpoint: bool
) -> None:
    import contextlib

    from mlx_dora.train import stepper

    settings = {"iters": 6, "grad_accumulation_steps": 2, "grad_checkpoint": checkpoint}
    _, held = run("held", **settings)
    monkeypatch.setattr(stepper, "held_norms", lambda model: contextlib.nullcontext())
    _, computed = run("computed", **settings)
    expected = tensors(computed.adapter_path)
    for name, value in tensors(held.adapter_path).items():
        assert_close(value, to_numpy(expected[name]), bound=1e-5)


def test_the_first_update_equals_adam(
    run: Run, make_tiny_model: Callable[..., nn.Module]
) -> None:
    model = make_tiny_model()
    mx.random.seed(0)
    apply_dora(model, DoRAConfig(rank=4, scale=2.0, num_layers=-1))
    start = dict(tree_flatten(model.trainable_parameters()))
    batch = pad_batch(EXAMPLES[:4], 2048)
    _, gradient = nn.value_and_grad(model, loss_fn)(model, *batch)
    gradient = dict(tree_flatten(gradient))
    _, report = run(
        iters=1, learning_rate=0.01, options={"batches": lambda *_, **__: iter([batch])}
    )
    for name, value in tensors(report.adapter_path).items():
        g = to_numpy(gradient[name])
        m, v = 0.1 * g, 0.001 * g**2  # MLX's default: no bias correction
        expected = to_numpy(start[name]) - 0.01 * m / (np.sqrt(v) + 1e-8)
        assert_close(value, expected, bound=1e-5)


def test_loss_and_batches_of_mlx_lm_can_be_used(run: Run) -> None:
    from mlx_lm.tuner.trainer import default_loss, iterate_batches

    def theirs(data: Any, size: int, length: int, **_: Any) -> Iterator[Any]:
        yield from iterate_batches(list(EXAMPLES), size, length, loop=True, seed=0)

    _, report = run(options={"loss": default_loss, "batches": theirs})
    assert report.steps == 5
    tokens, lengths = next(theirs(None, 4, 2048))
    counted = (np.array(lengths)[:, 1] - np.maximum(np.array(lengths)[:, 0], 1)) + 1
    assert counted.sum() > 0  # their mask counts one padding target per row
    assert tokens.shape[0] == 4


def test_log_has_every_report(run: Run) -> None:
    seen: list[StepReport] = []
    _, report = run(
        valid=EXAMPLES[:3],
        iters=7,
        steps_per_report=3,
        steps_per_eval=4,
        callback=seen.append,
    )
    lines = log(report.adapter_path)
    trained = [line["step"] for line in lines if "train_loss" in line]
    validated = [line["step"] for line in lines if "val_loss" in line]
    assert trained == [3, 6, 7]
    assert validated == [0, 4, 7]
    assert seen == list(report.history)
    assert [entry.to_dict() for entry in seen] == lines
    assert lines[-2]["trained_tokens"] == report.trained_tokens
    summary = config(report.adapter_path)["mlx_dora"]["training"]
    assert summary["steps"] == 7
    assert summary["val_loss"] == report.val_loss
    assert summary["optimizer_config"]["bias_correction"] is False


def test_reported_loss_is_the_mean_over_tokens(run: Run) -> None:
    seen: list[StepReport] = []
    batches = [pad_batch(EXAMPLES[:2], 2048), pad_batch(EXAMPLES[3:8], 2048)]
    model, _ = run(
        "zero",
        iters=2,
        learning_rate=1e-12,
        options={"batches": lambda *_, **__: iter(batches)},
        callback=seen.append,
    )
    values = [loss_fn(model, *batch) for batch in batches]
    tokens = [int(count) for _, count in values]
    total = sum(float(v) * n for (v, _), n in zip(values, tokens, strict=True))
    assert seen[0].train_loss == pytest.approx(total / sum(tokens), rel=1e-4)
    assert seen[0].trained_tokens == sum(tokens)


def test_progress_counts_steps_and_rows(run: Run) -> None:
    done: dict[str, int] = {}

    def progress(phase: str, total: int, new: int) -> None:
        done[phase] = done.get(phase, 0) + new
        assert total == {"train": 5, "validate": 8}[phase]

    run(valid=EXAMPLES, val_batches=2, progress=progress)
    assert done == {"train": 5, "validate": 16}


def test_the_adapter_is_saved_during_training(run: Run, tmp_path: Path) -> None:
    steps = []

    def look(phase: str, total: int, new: int) -> None:
        path = tmp_path / "adapter" / "adapter_config.json"
        saved = json.loads(path.read_text()) if path.exists() else None
        steps.append(saved and saved["mlx_dora"]["training"]["steps"])

    run(iters=6, save_every=2, progress=look)
    assert steps == [None, None, 2, 2, 4, 4]
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapters.safetensors",
        "checkpoints",
        "log.jsonl",
    ]


def test_the_saved_adapter_equals_the_trained_adapter(
    run: Run, make_tiny_model: Callable[..., nn.Module]
) -> None:
    model, report = run()
    fresh = make_tiny_model()
    attach_adapter(fresh, load_adapter(report.adapter_path))
    fresh.eval()
    tokens = mx.array([EXAMPLES[1][0]])
    assert mx.array_equal(fresh(tokens), model(tokens))


def test_a_quantized_base_trains(
    run: Run, make_tiny_model: Callable[..., nn.Module]
) -> None:
    model = make_tiny_model(bits=4)
    _, report = run(model=model, valid=EXAMPLES, iters=25)
    assert report.val_loss < 0.8 * report.first_val_loss


def test_half_precision_full_training_accumulates_in_float32(
    run: Run, make_tiny_model: Callable[..., nn.Module]
) -> None:
    model = make_tiny_model(dtype=mx.bfloat16)
    model, report = run(
        model=model,
        valid=EXAMPLES,
        iters=20,
        fine_tune_type="full",
        optimizer="sgd",
        learning_rate=0.3,
        grad_accumulation_steps=2,
    )
    assert {v.dtype for v in tensors(report.adapter_path).values()} == {mx.bfloat16}
    assert report.val_loss < report.first_val_loss


def test_training_starts_from_saved_weights(run: Run) -> None:
    _, first = run("first", valid=EXAMPLES, iters=20)
    _, second = run(
        "second",
        valid=EXAMPLES,
        iters=1,
        learning_rate=1e-9,
        resume_adapter_file=str(first.adapter_path / "adapters.safetensors"),
    )
    assert second.first_val_loss == pytest.approx(first.val_loss, rel=1e-6)


def test_existing_layers_are_trained(
    run: Run, make_tiny_model: Callable[..., nn.Module]
) -> None:
    model = make_tiny_model()
    paths = apply_dora(
        model, DoRAConfig(rank=4, scale=2.0, keys=("self_attn.q_proj",), num_layers=-1)
    )
    _, report = run(model=model)
    assert list(report.modules) == paths
    with pytest.raises(DoRAError, match=r"rank and scale \(4, 2\.0\), the config says"):
        run("other", model=model, rank=8)


def test_ctrl_c_finishes_the_step_and_saves(run: Run, tmp_path: Path) -> None:
    def press(phase: str, total: int, new: int) -> None:
        steps.append(new)
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    steps: list[int] = []
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(iters=100, progress=press, valid=EXAMPLES[:1], val_batches=0)
    assert signal.getsignal(signal.SIGINT) == before
    assert config(tmp_path / "adapter")["mlx_dora"]["training"]["steps"] in (3, 4)
    assert log(tmp_path / "adapter")[-1]["step"] in (3, 4)


BAD_STARTS: dict[str, tuple[dict[str, Any], str]] = {
    "no rows": ({"data": []}, "the training data is empty"),
    "a bad row": ({"data": [{"txt": "a"}]}, "found 'txt'"),
    "no target": ({"data": [([1, 2], 2)]}, "no row has a target token"),
    "no such key": ({"keys": ("q_prog",)}, "q_prog"),
    "nothing to train": ({"num_layers": 0}, "nothing to train"),
    "too many blocks": ({"num_layers": 9}, "only 2 blocks"),
    "bad optimizer": ({"optimizer_config": {"adam": {"beta": 1}}}, "unknown beta"),
    "bad schedule": ({"lr_schedule": {"name": "cosine"}}, "name must be"),
    "bad resume": ({"resume_adapter_file": "nowhere"}, "nowhere does not exist"),
    "no service": ({"report_to": "wandb"}, "report_to needs wandb"),
}


@pytest.mark.parametrize("name", list(BAD_STARTS))
def test_a_bad_start_leaves_no_folder(run: Run, tmp_path: Path, name: str) -> None:
    settings, message = BAD_STARTS[name]
    with pytest.raises(DoRAError, match=message) as info:
        run(**settings)
    assert "\n" not in str(info.value)
    assert not (tmp_path / "adapter").exists()


def test_an_adapter_is_not_replaced_without_overwrite(run: Run, tmp_path: Path) -> None:
    _, report = run(iters=2)
    before = tensors(report.adapter_path)
    mx.eval(before)
    with pytest.raises(DoRAError, match="holds an adapter already"):
        run(iters=3)
    assert same_bits(tensors(report.adapter_path), before)
    run(iters=1, resume_adapter_file=str(report.adapter_path))
    run(iters=3, overwrite=True)
    assert [line["step"] for line in log(report.adapter_path)] == [3]
    (tmp_path / "file").write_text("")
    with pytest.raises(DoRAError, match="is a file, not a folder"):
        run("file")


def test_truncated_and_skipped_rows_are_in_the_report(run: Run) -> None:
    data = [*EXAMPLES, ([1] * 90, 80), ([1] * 90, 5)]
    _, report = run(data=data, max_seq_length=40)
    assert (report.rows_truncated, report.rows_skipped) == (2, 1)
