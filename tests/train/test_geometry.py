from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_dora import DoRAConfig, apply_dora
from mlx_dora.adapters.surgery import dora_layers
from mlx_dora.train.geometry import measure_geometry, summarise
from tests.checks import to_numpy
from tests.train.saved import log

KEYS = ("self_attn.q_proj", "mlp.down_proj", "model.embed_tokens")


@pytest.mark.parametrize("size", [1e-4, 1e-2, 1.0])
def test_geometry_equals_that_of_the_dense_weights(
    make_tiny_model: Callable[..., nn.Module], size: float
) -> None:
    model = make_tiny_model()
    apply_dora(model, DoRAConfig(rank=4, scale=2.0, keys=KEYS, num_layers=-1))
    layers = [layer for _, layer in dora_layers(model)]
    for layer in layers:
        layer.lora_b = size * mx.random.normal(layer.lora_b.shape)
        layer.m = layer.m * (1 + 0.1 * mx.random.normal(layer.m.shape))
    m = layers[1].m
    layers[1].m = mx.where(mx.arange(m.size) % 3 == 0, -m, m)
    geometry = measure_geometry(model)
    assert len(geometry) == 5
    for path, layer in dora_layers(model):
        base = to_numpy(layer.base["weight"])
        a, b = (to_numpy(factor) for factor in layer.factors())
        direction, m = base + 2.0 * (a @ b).T, to_numpy(layer.m)
        norm = np.linalg.norm(direction, axis=1)
        length = np.linalg.norm(base, axis=1)
        cosine = np.sign(m) * (base * direction).sum(axis=1) / (norm * length)
        measured = geometry[path]
        assert measured.delta_m == pytest.approx(
            np.abs(np.abs(m) - length).mean(), rel=1e-4
        )
        # Near 0 the rounding of the norms, 1e-7 of a length, dominates.
        assert measured.delta_d == pytest.approx(
            (1 - cosine).mean(), rel=2e-2, abs=1e-10
        )
        assert measured.gain_min == pytest.approx((m / norm).min(), rel=1e-5)
        assert measured.gain_max == pytest.approx((m / norm).max(), rel=1e-5)
    values = list(geometry.values())
    summary = summarise(geometry)
    expected = np.corrcoef([v.delta_m for v in values], [v.delta_d for v in values])
    assert summary["correlation"] == pytest.approx(expected[0, 1])
    assert summary["gain_min"] == min(v.gain_min for v in values)


def test_nothing_moves_at_the_start_nor_do_zero_rows(
    make_tiny_model: Callable[..., nn.Module],
) -> None:
    model: Any = make_tiny_model()
    weight = model.model.layers[0].self_attn.q_proj.weight
    model.model.layers[0].self_attn.q_proj.weight = mx.where(
        mx.arange(weight.shape[0])[:, None] == 3, 0.0, weight
    )
    apply_dora(model, DoRAConfig(rank=4, num_layers=-1))
    summary = summarise(measure_geometry(model))
    assert (summary["delta_m"], summary["delta_d"]) == (0, 0)
    assert (summary["gain_min"], summary["gain_max"]) == (1, 1)
    assert "correlation" not in summary


def test_reports_hold_geometry_and_checkpoints_hold_it_by_layer(
    run: Callable[..., Any],
) -> None:
    model, report = run(iters=6, steps_per_report=2, save_every=3)
    lines = log(report.adapter_path)
    assert [line["step"] for line in lines] == [2, 3, 4, 6]
    assert ["layers" in line for line in lines] == [False, True, False, True]
    assert all(line["gain_min"] < 1 < line["gain_max"] for line in lines)
    assert lines[-1]["delta_d"] > lines[0]["delta_d"] > 0
    geometry = measure_geometry(model)
    assert lines[-1]["layers"].keys() == geometry.keys()
    for path, measured in geometry.items():
        kept = lines[-1]["layers"][path]
        assert kept["delta_m"] == pytest.approx(measured.delta_m, rel=1e-4)
        assert kept["delta_d"] == pytest.approx(measured.delta_d, rel=1e-2)
    _, plain = run("lora", iters=2, fine_tune_type="lora")
    assert "delta_m" not in log(plain.adapter_path)[-1]
