from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_dora import DoRAConfig, apply_dora
from mlx_dora.data.batches import pad_batch
from mlx_dora.evaluate.cross_entropy import summed_loss
from mlx_dora.evaluate.loss import loss_fn
from tests.checks import assert_close, to_numpy
from tests.evaluate.heads import EVERY_HEAD, assert_same_gradients

BATCH = pad_batch([(list(range(3, 40)), 0), (list(range(50, 71)), 6)], 64)


def whole_loss(model: nn.Module, batch: mx.array, lengths: mx.array) -> Any:
    """The loss by definition, with all logits and MLX's own derivative."""
    steps = mx.arange(1, batch.shape[1])
    mask = (steps >= lengths[:, 0:1]) & (steps < lengths[:, 1:])
    losses = nn.losses.cross_entropy(model(batch[:, :-1]), batch[:, 1:])
    return (losses * mask).sum() / mask.sum(), mask.sum()


@pytest.mark.usefixtures("few_logits")
@pytest.mark.parametrize(
    "compiled", [False, pytest.param(True, marks=pytest.mark.compiled)]
)
@pytest.mark.parametrize("bits", [None, 4])
@EVERY_HEAD
def test_gradients_equal_those_from_all_logits(
    make_tiny_model: Callable[..., nn.Module],
    tied: bool,
    keys: tuple[str, ...],
    bits: int | None,
    compiled: bool,
) -> None:
    model = make_tiny_model(tie_word_embeddings=tied, bits=bits)
    assert_same_gradients(model, keys, loss_fn, whole_loss, BATCH, compiled)


@pytest.mark.usefixtures("few_logits")
def test_gradient_of_the_hidden_states_equals_numpy() -> None:
    class Trunk(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = []
            self.table = nn.Embedding(320, 8)

        def __call__(self, tokens: mx.array, cache: Any = None) -> mx.array:
            return self.table(tokens)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = Trunk()
            self.head = nn.Linear(8, 320, bias=False)

        def __call__(self, tokens: mx.array, cache: Any = None) -> mx.array:
            return self.head(self.model(tokens))

    mx.random.seed(4)
    model = Model()
    tokens = mx.random.randint(0, 320, (2, 31))
    mask = mx.random.bernoulli(0.7, (2, 30))

    def loss(model: nn.Module) -> mx.array:
        return summed_loss(model, tokens[:, :-1], tokens[:, 1:], mask)

    value, gradient = nn.value_and_grad(model, loss)(model)
    table, head = to_numpy(model.model.table.weight), to_numpy(model.head.weight)
    words, kept = np.array(tokens), np.array(mask)
    logits = table[words[:, :-1]] @ head.T
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    hit = np.eye(320)[words[:, 1:]]
    assert_close(value, np.array(-(np.log((p * hit).sum(-1)) * kept).sum()))
    slope = (p - hit) * kept[..., None]
    expected = np.zeros_like(table)
    np.add.at(expected, words[:, :-1], slope @ head)
    assert_close(gradient["model"]["table"]["weight"], expected)
    of_head = np.einsum("rtv,rtd->vd", slope, table[words[:, :-1]])
    assert_close(gradient["head"]["weight"], of_head)


@pytest.mark.usefixtures("few_logits")
def test_a_models_processing_of_its_logits_is_kept() -> None:
    from mlx_lm.models import gemma2

    arguments = {
        "model_type": "gemma2",
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rms_norm_eps": 1e-5,
        "vocab_size": 320,
        "query_pre_attn_scalar": 8,
        "final_logit_softcapping": 0.5,
    }
    model = gemma2.Model(gemma2.ModelArgs.from_dict(arguments))
    for mode in (True, False):
        model.train(mode)
        value, _ = loss_fn(model, *BATCH)
        assert_close(value, to_numpy(whole_loss(model, *BATCH)[0]))


@pytest.mark.usefixtures("few_logits")
@pytest.mark.parametrize("training", [True, False])
def test_the_full_logits_never_exist(
    make_tiny_model: Callable[..., nn.Module], training: bool
) -> None:
    model = make_tiny_model(vocab_size=10_000)
    apply_dora(model, DoRAConfig(rank=4, num_layers=-1))
    model.train(training)
    tokens, lengths = pad_batch([([i % 300 for i in range(257)], 0)] * 4, 2048)
    mx.eval(model.parameters(), tokens, lengths)
    compute = nn.value_and_grad(model, loss_fn) if training else loss_fn
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(compute(model, tokens, lengths))
    whole = 1024 * 10_000 * 4
    # All logits at once would need three times `whole` in training, else once.
    assert mx.get_peak_memory() - before < 0.8 * whole


def test_a_model_without_a_known_trunk_is_warned_about_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(320, 320)

        def __call__(self, tokens: mx.array) -> mx.array:
            return self.table(tokens)

    model = Plain()
    expected = to_numpy(whole_loss(model, *BATCH)[0])
    for _ in range(2):
        assert_close(loss_fn(model, *BATCH)[0], expected)
    assert len(caplog.records) == 1
    assert "Plain: no known trunk" in caplog.text


class Counting(nn.Module):
    """A model whose head counts the tokens for which it computes logits."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Trunk()
        self.lm_head = nn.Linear(8, 320)
        self._seen: list[int] = []

    def __call__(self, tokens: mx.array) -> mx.array:
        hidden = self.model(tokens)
        self._seen.append(hidden.size // 8)
        return self.lm_head(hidden)


class Trunk(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(320, 8)
        self.layers = [nn.Linear(8, 8)]

    def __call__(self, tokens: mx.array) -> mx.array:
        return self.layers[0](self.table(tokens))


@pytest.mark.usefixtures("few_logits")
@pytest.mark.parametrize("training", [True, False])
def test_the_head_runs_on_targets_alone(training: bool) -> None:
    model = Counting()
    model.train(training)
    masked = pad_batch([(list(range(3, 40)), 30), (list(range(50, 71)), 18)], 64)
    value, count = loss_fn(model, *masked)
    assert int(count) == 7 + 3
    assert_close(value, to_numpy(whole_loss(model, *masked)[0]))
    whole = masked[0].shape[0] * (masked[0].shape[1] - 1)
    # The first call is the split's own, which is never evaluated; then the targets.
    assert model._seen[0] == whole
    assert sum(model._seen[1:-1]) == 10


def test_a_batch_without_a_target_has_loss_and_gradient_0() -> None:
    model = Counting()
    tokens = mx.array([[5, 6, 7, 8]])
    nothing = mx.array([[4, 4]])
    compute = nn.value_and_grad(model, loss_fn)
    (value, count), gradient = compute(model, tokens, nothing)
    assert (float(value), int(count)) == (0, 0)
    slopes = dict(tree_flatten(gradient)).values()
    assert slopes
    assert not any(to_numpy(slope).any() for slope in slopes)
