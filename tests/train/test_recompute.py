import math
from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from mlx_dora import DoRAConfig, apply_dora
from mlx_dora.data.batches import pad_batch
from mlx_dora.errors import DoRAError
from mlx_dora.evaluate.loss import loss_fn
from mlx_dora.layers import DoRALayer, DoRALinear, _layer, _shared, held_norms, linear
from mlx_dora.layers.wrap import VARIANTS
from mlx_dora.train.recompute import recomputed_blocks
from mlx_dora.train.run.start import trainable_tensors
from tests.adapters.stacks import make_model
from tests.checks import assert_close, to_numpy
from tests.train.conftest import EXAMPLES

BATCH = pad_batch(EXAMPLES[:4], 2048)


def adapted(
    make: Callable[..., nn.Module],
    dropout: float = 0.0,
    variant: str = "dora",
    **kind: Any,
) -> Any:
    model = make(**kind)
    mx.random.seed(1)
    settings: dict[str, Any] = {"variant": variant, "dropout": dropout}
    apply_dora(model, DoRAConfig(rank=4, scale=2.0, num_layers=-1, **settings))
    for name, value in trainable_tensors(model).items():
        if name.endswith("lora_b"):
            update = mx.random.normal(value.shape) * 0.1
            model.load_weights([(name, update)], strict=False)
    model.train()
    return model


def gradients(model: nn.Module, seed: int = 0) -> tuple[mx.array, dict[str, mx.array]]:
    mx.random.seed(seed)
    (loss, _), gradient = nn.value_and_grad(model, loss_fn)(model, *BATCH)
    return loss, dict(tree_flatten(gradient))


@pytest.mark.parametrize("bits", [None, 4])
def test_gradients_equal_those_without_checkpointing(
    make_tiny_model: Callable[..., nn.Module], bits: int | None
) -> None:
    model = adapted(make_tiny_model, bits=bits)
    loss, expected = gradients(model)
    with recomputed_blocks(model):
        again, actual = gradients(model)
    assert_close(again, to_numpy(loss))
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert_close(value, to_numpy(expected[name]), bound=1e-5)


@pytest.mark.parametrize("kind", ["qwen3_moe", "deepseek_v3"])
def test_blocks_called_without_keywords_and_with_experts(kind: str) -> None:
    """Some mlx-lm models call a block with keywords, others without."""
    model = adapted(make_model, kind=kind)
    loss, expected = gradients(model)
    with recomputed_blocks(model):
        again, actual = gradients(model)
    assert_close(again, to_numpy(loss))
    for name, value in actual.items():
        assert_close(value, to_numpy(expected[name]), bound=1e-5)


@pytest.mark.parametrize("variant", sorted({"dora"} | VARIANTS.keys() - {"pissa"}))
def test_every_variant_has_the_gradients_of_a_plain_pass(
    make_tiny_model: Callable[..., nn.Module], variant: str
) -> None:
    model = adapted(make_tiny_model, variant=variant)
    loss, expected = gradients(model)
    with recomputed_blocks(model):
        again, actual = gradients(model)
    assert_close(again, to_numpy(loss), bound=1e-6)
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert_close(value, to_numpy(expected[name]), bound=1e-5)


class Counted:
    """Counts the norms that layers compute, apart and with the product of tokens."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.norms = 0
        for module, name in ((_layer, "row_norm"), (linear, "product_and_norm")):
            plain = getattr(module, name)
            monkeypatch.setattr(module, name, partial(self._counting, plain))

    def _counting(self, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.norms += 1
        return plain(*args, **kwargs)


@pytest.mark.parametrize("rides", [False, True])
def test_the_recomputed_pass_computes_no_norm(
    make_tiny_model: Callable[..., nn.Module],
    monkeypatch: pytest.MonkeyPatch,
    rides: bool,
) -> None:
    monkeypatch.setattr(linear, "rides", lambda base, x: rides)
    model = adapted(make_tiny_model)
    layers = [m for m in model.modules() if isinstance(m, DoRALayer)]
    _, expected = gradients(model)
    counted = Counted(monkeypatch)
    with recomputed_blocks(model):
        _, actual = gradients(model)
        assert counted.norms == len(layers)
        _, again = gradients(model)  # of the same weights: the norms are not kept
        assert counted.norms == 2 * len(layers)
    assert all("_norm" not in layer for layer in layers)
    for name, value in actual.items():
        assert_close(value, to_numpy(expected[name]), bound=1e-5)
        assert mx.array_equal(value, again[name])


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("limit", [0.0, math.inf])
def test_of_few_tokens_the_last_output_of_a_block_is_not_computed_again(
    make_tiny_model: Callable[..., nn.Module],
    monkeypatch: pytest.MonkeyPatch,
    bits: int | None,
    dropout: float,
    limit: float,
) -> None:
    monkeypatch.setattr(_shared, "_TOKENS_PER_COLUMN", limit)
    known = []
    plain = _shared.rescale_known
    monkeypatch.setattr(
        _shared, "rescale_known", lambda *a: known.append(a[-1].shape[-1]) or plain(*a)
    )
    model = adapted(make_tiny_model, bits=bits, dropout=dropout)
    with recomputed_blocks(model):
        _, actual = gradients(model)
        with monkeypatch.context() as patch:  # the same masks, nothing known
            patch.setattr(_shared, "_TOKENS_PER_COLUMN", 0.0)
            _, expected = gradients(model)
    width = model.model.layers[0].mlp.down_proj.m.shape[0]
    assert known == [width] * (len(model.layers) if limit else 0)
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert_close(value, to_numpy(expected[name]), bound=1e-6)


def test_a_layer_that_a_block_calls_twice_is_computed_again() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = DoRALinear.from_base(nn.Linear(32, 32), r=4, scale=2.0)

        def __call__(self, x: mx.array) -> mx.array:
            return x + self.layer(mx.tanh(self.layer(x)))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = [Twice()]

    mx.random.seed(0)
    model: Any = Model()
    model.layers[0].layer.lora_b = mx.random.normal((4, 32)) * 0.1
    model.freeze()
    model.layers[0].layer.unfreeze(keys=["lora_a", "lora_b", "m"], recurse=False)
    model.train()
    x = mx.random.normal((3, 32))

    def squares(model: Any) -> mx.array:
        return mx.square(model.layers[0](x)).sum()

    compute = nn.value_and_grad(model, squares)
    expected = dict(tree_flatten(compute(model)[1]))
    with recomputed_blocks(model):
        actual = dict(tree_flatten(compute(model)[1]))
    assert len(actual) == 3
    for name, value in actual.items():
        assert_close(value, to_numpy(expected[name]), bound=1e-5)


def test_two_passes_in_one_step_keep_their_own_norms(
    make_tiny_model: Callable[..., nn.Module],
) -> None:
    """Parameters that change between two passes change the norms of the second."""
    model = adapted(make_tiny_model)
    block = model.model.layers[0].mlp.up_proj
    start = block.lora_b

    def both(factor: mx.array) -> mx.array:
        block.lora_b = start
        first = loss_fn(model, *BATCH)[0]
        block.lora_b = factor * start
        return first + loss_fn(model, *BATCH)[0]

    expected = mx.value_and_grad(both)(mx.array(3.0))
    with recomputed_blocks(model):
        actual = mx.value_and_grad(both)(mx.array(3.0))
    for value, want in zip(actual, expected, strict=True):
        assert_close(value, to_numpy(want), bound=1e-5)


def test_held_norms_are_used_and_stay_held(
    make_tiny_model: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(make_tiny_model)
    _, expected = gradients(model)
    with held_norms(model), recomputed_blocks(model):
        counted = Counted(monkeypatch)
        _, actual = gradients(model)
        assert counted.norms == 0
        assert all("_norm" in m for m in model.modules() if isinstance(m, DoRALayer))
    for name, value in actual.items():
        assert_close(value, to_numpy(expected[name]), bound=1e-5)


def test_a_frozen_block_after_an_adapted_block_passes_gradients_on(
    make_tiny_model: Callable[..., nn.Module],
) -> None:
    """Its only array is its input."""
    model = make_tiny_model()
    paths = (*(f"model.layers.0.self_attn.{name}_proj" for name in "qv"),)
    apply_dora(model, DoRAConfig(rank=4, num_layers=-1, keys=paths))
    model.train()
    _, expected = gradients(model)
    with recomputed_blocks(model):
        _, actual = gradients(model)
    assert actual.keys() == expected.keys()
    assert actual
    for name, value in actual.items():
        assert_close(value, to_numpy(expected[name]), bound=1e-5)


def test_gradients_fit_the_dropout_of_the_forward_pass(
    make_tiny_model: Callable[..., nn.Module],
) -> None:
    model = adapted(make_tiny_model, dropout=0.5)
    block = model.model.layers[0].mlp.up_proj
    start = block.lora_b
    direction = mx.random.normal(start.shape, key=mx.random.key(5))
    block.hold_norm()  # held constant in the backward pass
    losses = []
    with recomputed_blocks(model):
        _, gradient = gradients(model)
        for step in (-1e-2, 1e-2):
            block.lora_b = start + step * direction
            losses.append(gradients(model)[0])
    slope = (gradient["model.layers.0.mlp.up_proj.lora_b"] * direction).sum()
    measured = float(losses[1] - losses[0]) / 2e-2
    assert measured == pytest.approx(float(slope), rel=0.02)


def test_dropout_changes_from_step_to_step_and_repeats_with_the_seed(
    make_tiny_model: Callable[..., nn.Module],
) -> None:
    model = adapted(make_tiny_model, dropout=0.5)
    with recomputed_blocks(model):
        mx.random.seed(3)
        first, second = (float(loss_fn(model, *BATCH)[0]) for _ in range(2))
        mx.random.seed(3)
        assert float(loss_fn(model, *BATCH)[0]) == first
    assert first != second


def test_classes_are_unchanged_and_blocks_are_restored(
    make_tiny_model: Callable[..., nn.Module],
) -> None:
    model, other = adapted(make_tiny_model, dropout=0.1), make_tiny_model()
    block = model.model.layers[0]
    kind, call = type(block), type(block).__call__
    kinds = [type(module) for module in model.modules()]
    names = [name for name, _ in tree_flatten(model.parameters())]
    with pytest.raises(RuntimeError, match="inside"), recomputed_blocks(model):
        assert type(block) is not kind
        assert isinstance(block, kind)
        assert type(other.layers[0]) is kind  # pyright: ignore[reportOptionalSubscript, reportAttributeAccessIssue]
        assert kind.__call__ is call
        gradients(model)
        raise RuntimeError("inside")
    assert kind.__call__ is call
    assert [type(module) for module in model.modules()] == kinds
    assert [name for name, _ in tree_flatten(model.parameters())] == names


def test_recomputation_needs_less_memory(
    make_tiny_model: Callable[..., nn.Module],
) -> None:
    model = adapted(make_tiny_model, num_hidden_layers=8)
    batch = pad_batch([([i % 300 for i in range(256)], 0)] * 8, 2048)

    def peak() -> int:
        mx.clear_cache()
        mx.reset_peak_memory()
        mx.eval(nn.value_and_grad(model, loss_fn)(model, *batch))
        return mx.get_peak_memory()

    plain = peak()
    with recomputed_blocks(model):
        assert peak() < 0.6 * plain


def test_each_further_block_costs_only_its_input(
    make_tiny_model: Callable[..., nn.Module], run: Callable[..., Any]
) -> None:
    rows, length = 8, 65

    def peak(blocks: int) -> int:
        model = make_tiny_model(num_hidden_layers=blocks, hidden_size=64)
        _, report = run(
            f"{blocks}",
            model=model,
            data=[([1 + i % 60 for i in range(length)], 0)] * rows,
            batch_size=rows,
            iters=2,
            grad_checkpoint=True,
        )
        held = sum(value.nbytes for _, value in tree_flatten(model.parameters()))  # pyright: ignore[reportAttributeAccessIssue] - arrays
        # 12 bytes per trained parameter: Adam's two moments and the gradient.
        return report.peak_memory_bytes - held - 12 * report.trainable_parameters

    stream = rows * (length - 1) * 64 * 4
    assert peak(20) - peak(4) < 3 * 16 * stream  # more than 6 with `mx.checkpoint`


def test_a_model_without_blocks_is_refused() -> None:
    with (
        pytest.raises(DoRAError, match="Linear has none"),
        recomputed_blocks(nn.Linear(2, 2)),
    ):
        pass
