"""Memory of a training step over the number of tokens: a line."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_dora import DoRAConfig, apply_dora
from mlx_dora.data.documents import DocumentCache
from mlx_dora.data.schedule import Schedule
from mlx_dora.data.targets import Example
from mlx_dora.train import TrainConfig
from mlx_dora.train.recompute import recomputed_blocks
from tests.checks import assert_close
from tests.data.test_documents import make
from tests.train.conftest import plain_stepper

LENGTHS = (1024, 2048, 4096, 8192)
Attention = Callable[..., mx.array]


def peak(
    model: nn.Module, tokens: int, rows: list[Example], *, recompute: bool, **way: Any
) -> int:
    """Bytes at the peak of a training step on one batch."""
    settings = TrainConfig(max_seq_length=tokens, grad_checkpoint=recompute, **way)
    schedule = Schedule(
        rows, 1, tokens, packing=settings.packing, batch_tokens=settings.batch_tokens
    )
    assert schedule.length(1) == 1
    batch = next(schedule.batches())
    assert batch[0].size == tokens
    stepper = plain_stepper(model, settings)
    mx.eval(model.state, batch)

    def step() -> None:
        with recomputed_blocks(model, recompute):
            stepper.gradient([batch])

    # How far MLX allocates ahead is a matter of timing.
    return max(peak_of(step) for _ in range(3))


def peak_of(step: Callable[[], object]) -> int:
    """Bytes at the peak of a step beyond what was there before it."""
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    step()
    return mx.get_peak_memory() - before


def slope(peaks: list[int]) -> float:
    """Slope of the logarithm of the peak over that of the number of tokens."""
    return float(np.polyfit(np.log(LENGTHS), np.log(peaks), 1)[0])


def small_model(make_tiny_model: Callable[..., nn.Module]) -> nn.Module:
    model = make_tiny_model()
    apply_dora(model, DoRAConfig(rank=4, scale=2.0, num_layers=-1))
    return model.train()


def documents(tokens: int, length: int = 128) -> list[Example]:
    random = np.random.default_rng(0)
    rows = tokens // length
    return [(random.integers(1, 60, size=length).tolist(), 0) for _ in range(rows)]


@pytest.mark.parametrize(
    ("way", "recompute"),
    [
        ("packing", False),
        ("batch_tokens", False),
        pytest.param("packing", True, marks=pytest.mark.slow),
        pytest.param("batch_tokens", True, marks=pytest.mark.slow),
    ],
)
def test_many_documents_take_memory_in_proportion(
    make_tiny_model: Callable[..., nn.Module], way: str, recompute: bool
) -> None:
    model = small_model(make_tiny_model)
    peaks = [
        peak(
            model,
            n,
            documents(n),
            recompute=recompute,
            **({"packing": True} if way == "packing" else {"batch_tokens": n}),
        )
        for n in LENGTHS
    ]
    assert slope(peaks) <= 1.05, peaks


def test_a_mask_for_packed_rows_would_not(
    make_tiny_model: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlx_dora.data.documents._starts", lambda documents: None)
    model = small_model(make_tiny_model)
    short, long = (
        peak(model, n, documents(n), recompute=True, packing=True) for n in LENGTHS[:2]
    )
    assert long > 3 * short


def without_scores(
    queries: mx.array, keys: mx.array, values: mx.array, *, scale: float, **_: Any
) -> mx.array:
    """Stands in for the fused attention of a GPU: depends on all, but has no scores.

    The CPU's attention materializes its scores. All that a step allocates besides is
    the same as on a GPU.
    """
    repeats = queries.shape[1] // keys.shape[1]
    keys, values = (mx.repeat(a, repeats, axis=1) for a in (keys, values))
    return values * mx.sigmoid(scale * (queries * keys).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize("recompute", [False, True])
def test_one_long_row_takes_memory_in_proportion_without_scores(
    make_tiny_model: Callable[..., nn.Module],
    recompute: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", without_scores)
    model = small_model(make_tiny_model)
    peaks = [
        peak(model, n, documents(n, n), recompute=recompute, batch_tokens=n)
        for n in LENGTHS
    ]
    assert slope(peaks) <= 1.05, peaks


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_of_packed_rows_are_those_under_a_mask(
    make_tiny_model: Callable[..., nn.Module],
    recompute: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = small_model(make_tiny_model)
    for layer in model.modules():
        if "lora_b" in layer:
            layer.lora_b = mx.random.normal(layer.lora_b.shape, key=mx.random.key(3))
    settings = TrainConfig(packing=True, max_seq_length=64)
    random = np.random.default_rng(0)
    rows: list[Example] = [
        (random.integers(1, 60, size=6 + 7 * i).tolist(), i) for i in range(6)
    ]
    batch = next(Schedule(rows, 3, 64, packing=True).batches())
    calls = []
    attend = DocumentCache.attend
    monkeypatch.setattr(
        DocumentCache,
        "attend",
        lambda self, *a, **k: (calls.append(a), attend(self, *a, **k))[1],
    )

    def gradient() -> dict[str, Any]:
        stepper = plain_stepper(model, settings)
        with recomputed_blocks(model, recompute):
            total = stepper.gradient([batch]).total
        return {name: np.array(value) for name, value in tree_flatten(total)}

    found = gradient()
    assert len(calls) == len(model["model"]["layers"]) * (1 + recompute)
    monkeypatch.setattr("mlx_dora.data.documents._starts", lambda documents: None)
    for name, value in gradient().items():
        assert_close(found[name], value, bound=1e-4)


def test_the_memory_of_a_mask_is_stated(
    run: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    settings: dict[str, Any] = {"packing": True, "max_seq_length": 2000, "iters": 1}
    run("llama", **settings)
    assert "mask" not in caplog.text
    run("gemma2", model=make("gemma2"), **settings)
    # 4 x 2000² bytes
    assert (
        "gemma2 computes its own attention, which takes a mask of 16 MB for 4 rows"
        in (caplog.text)
    )


def test_the_norm_of_all_gradients_holds_no_block_back(
    make_tiny_model: Callable[..., nn.Module],
) -> None:
    """Each block's arrays are freed as the backward pass leaves the block.

    They are not if the norm of all gradients is evaluated together with them: MLX then
    computes many of the adapters' gradients last.
    """
    model = make_tiny_model(num_hidden_layers=24)
    apply_dora(model, DoRAConfig(rank=4, scale=2.0, num_layers=-1))
    model.train()
    rows = [([1 + n % 60 for n in range(33)], 30)] * 16
    settings = TrainConfig(batch_size=16, max_seq_length=33)
    batch = next(Schedule(rows, 16, 33).batches())
    stepper = plain_stepper(model, settings)
    mx.eval(model.state, batch)

    def gradients_alone() -> None:
        loss, _, gradients, _ = stepper._differentiate(*batch)
        mx.eval(gradients, loss)

    def with_norm() -> None:
        _, _, gradients, _ = stepper._differentiate(*batch)
        mx.eval(gradients, stepper._measure(gradients, mx.array(1.0)))

    alone, together = peak_of(gradients_alone), peak_of(with_norm)
    assert together > 1.1 * alone  # or the order does not matter any more
    assert peak_of(lambda: stepper.gradient([batch])) < 1.03 * alone
