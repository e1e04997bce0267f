"""Mean squared gradients against gradients by hand in float64."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_dora import DoRAConfig, DoRAError, apply_dora
from mlx_dora.adapters.surgery import adapter_layers
from mlx_dora.layers import weight_of
from mlx_dora.matrix.weight import dense
from mlx_dora.merge.fisher.config import FisherConfig
from mlx_dora.merge.fisher.squared_gradients import SquaredGradients
from tests.checks import assert_close, to_numpy
from tests.merge.fisher.toy import PATHS, Toy, gradients, make_toy

ROWS = [([1, 5, 2, 9, 3], 2), ([4, 4, 0, 7, 10, 2, 6], 1), ([8, 3, 1], 2)]


def estimate(model: nn.Module, rows=ROWS, **kw) -> dict[str, mx.array]:
    config = FisherConfig(**{"labels": "data", "batch_size": 2, **kw})
    return dict(SquaredGradients(model, rows, list(PATHS), config, None).matrices())


def acting(model: Toy) -> list[np.ndarray]:
    """The weight matrix of each block."""
    result = []
    for layer in model.model.layers:
        module = layer.proj
        base = weight_of(module.get("linear", module))
        matrix = to_numpy(dense(base))
        if "lora_a" in module:
            a, b, m = (to_numpy(module[leaf]) for leaf in ("lora_a", "lora_b", "m"))
            matrix = matrix + module.scale * (a @ b).T
            matrix *= (m / np.linalg.norm(matrix, axis=1))[:, None]
        result.append(matrix)
    return result


def adapt(model: Toy) -> None:
    apply_dora(model, DoRAConfig(rank=3, scale=2.0, dropout=0.5, keys=("proj",),
                                 num_layers=2))  # fmt: skip
    for _, layer in adapter_layers(model):
        layer.lora_b = 0.1 * mx.random.normal(layer.lora_b.shape)
        layer.m = layer.m * (1 + 0.1 * mx.random.normal(layer.m.shape))


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("adapted", [False, True])
def test_squares_are_taken_of_each_rows_gradient(bits, adapted: bool) -> None:
    model = make_toy(bits)
    if adapted:
        adapt(model)
    weights = acting(model)
    truth = [np.zeros_like(weight) for weight in weights]
    for tokens, first in ROWS:
        _, result = gradients(model, weights, tokens, first)
        places = [
            grads[label] for grads, label in zip(result, tokens[first:], strict=True)
        ]
        for i in (0, 1):
            truth[i] += np.square(np.sum([place[i] for place in places], axis=0))
    by_element = estimate(model, granularity="element")
    by_row = estimate(model)
    for i, path in enumerate(PATHS):
        assert_close(by_element[path], truth[i] / len(ROWS))
        assert_close(by_row[path], truth[i].sum(1) / len(ROWS))


def test_drawn_labels_give_the_fisher_information() -> None:
    """Not the empirical information: the mean is over the model's own distribution."""
    model = make_toy()
    row = ([1, 5, 2, 9, 3], 2)
    weights = acting(model)
    probabilities, result = gradients(model, weights, *row)
    truth = [
        sum(
            p * np.square(grads[i]).sum(1)
            for ps, places in zip(probabilities, result, strict=True)
            for p, grads in zip(ps, places, strict=True)
        )
        for i in (0, 1)
    ]
    drawn = estimate(model, [row] * 4000, labels="sampled", batch_size=500)
    empirical = estimate(model, [row])
    for i, path in enumerate(PATHS):
        assert_close(drawn[path], np.array(truth[i]), bound=0.1)
        error = np.linalg.norm(to_numpy(empirical[path]) - truth[i])
        assert error > 0.3 * np.linalg.norm(truth[i])


def test_drawn_labels_follow_the_seed() -> None:
    model = make_toy()
    first, same, other = (
        estimate(model, labels="sampled", seed=seed)[PATHS[0]] for seed in (1, 1, 2)
    )
    assert mx.array_equal(first, same)
    assert not mx.array_equal(first, other)


@pytest.mark.parametrize("granularity", ["row", "element"])
def test_several_passes_give_the_same(
    granularity: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_toy()
    kw = {"granularity": granularity, "labels": "sampled"}
    whole = estimate(model, **kw)
    assert not caplog.messages
    parts = estimate(model, memory_limit=1, **kw)
    assert caplog.messages == ["2 passes over the data, to stay under the memory limit"]
    for path in PATHS:
        assert_close(parts[path], to_numpy(whole[path]), bound=1e-6)


def test_the_model_is_left_as_it_was() -> None:
    model = make_toy()
    model.train()
    before = [layer.proj for layer in model.model.layers]
    estimate(model)
    assert model.training
    assert [layer.proj for layer in model.model.layers] == before
    with pytest.raises(DoRAError, match="no row has a target"):
        estimate(model, [([1, 2], 2)])


class Twice(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __call__(self, x: mx.array) -> mx.array:
        return self.inner(self.inner(x))


def test_a_matrix_that_is_used_twice_is_left_out_and_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = make_toy()
    model.model.layers[0]["proj"] = Twice(model.model.layers[0].proj)
    paths = ["model.layers.0.proj.inner", PATHS[1]]
    config = FisherConfig(batch_size=2)
    result = dict(SquaredGradients(model, ROWS, paths, config, None).matrices())
    assert list(result) == [PATHS[1]]
    assert caplog.messages == [
        "model.layers.0.proj.inner is not applied exactly once to each token: left "
        "out, without Fisher information"
    ]


class Flat(Twice):
    def __call__(self, x: mx.array) -> mx.array:
        return self.inner(x.reshape(-1, x.shape[-1])).reshape(x.shape)


def test_rows_laid_end_to_end_are_separated() -> None:
    model = make_toy()
    expected = estimate(model)[PATHS[0]]
    model.model.layers[0]["proj"] = Flat(model.model.layers[0].proj)
    paths = ["model.layers.0.proj.inner"]
    config = FisherConfig(batch_size=2, labels="data")
    result = dict(SquaredGradients(model, ROWS, paths, config, None).matrices())
    assert_close(result[paths[0]], to_numpy(expected), bound=1e-6)


def test_by_row_uses_no_array_of_the_weights_size(tiny_model: nn.Module) -> None:
    path = "model.layers.1.mlp.down_proj"
    config = FisherConfig(batch_size=1)
    wide = nn.Linear(4096, 4096, bias=False)
    tiny_model["model"]["layers"][1]["mlp"].down_proj = nn.Sequential(
        nn.Linear(64, 4096), wide, nn.Linear(4096, 32)
    )
    mx.eval(tiny_model.parameters())
    path = f"{path}.layers.1"
    rows = [(list(range(12)), 0)]
    result = SquaredGradients(tiny_model, rows, [path], config, None)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    assert dict(result.matrices())[path].shape == (4096,)
    assert mx.get_peak_memory() - before < 4 * 4096 * 4096 / 4
