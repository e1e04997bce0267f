"""Measures how far each DoRA layer has moved from its base during training."""

from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_dora.adapters.surgery import dora_layers
from mlx_dora.layers import DoRALayer
from mlx_dora.matrix.terms import one_minus_cosine, row_gain


@dataclass(frozen=True)
class LayerGeometry:
    """Change of a layer from its base (section 3.2 of DoRA, arXiv:2402.09353).

    Args:
        delta_m: ΔM, the mean over rows of ``|‖W'‖ − ‖W0‖|``.
        delta_d: ΔD, the mean over rows of ``1 − cos(W', W0)``.
        gain_min: Minimum over rows of g = m/‖W0 + sBA‖.
        gain_max: Maximum over rows of g.
    """

    delta_m: float
    delta_d: float
    gain_min: float
    gain_max: float


def measure_geometry(model: nn.Module) -> dict[str, LayerGeometry]:
    """Measure every DoRA layer of a model; empty if there are none.

    Computed from the norms, the length of the update and the magnitudes. W0 is read
    once, for the norms, and no adapted weight is built.
    """
    layers = dora_layers(model)
    if not layers:
        return {}
    values = np.array(
        mx.stack([_measure(layer.export()) for _, layer in layers]), np.float64
    )
    return {
        path: LayerGeometry(*row)
        for (path, _), row in zip(layers, values.tolist(), strict=True)
    }


def _measure(layer: DoRALayer) -> mx.array:
    base, norm, m = mx.sqrt(layer["_squared_base"]), layer.norm(), layer["m"]
    update = mx.sqrt(layer.adapted().update.squared_rows())  # ‖BA‖
    moved = one_minus_cosine(base, norm, abs(layer.scale) * update)
    moved = mx.where(m < 0, 2 - moved, moved)
    lives = norm > 0  # a zero row stays zero for every m
    length = mx.where(lives, mx.abs(m), 0.0)
    gain = row_gain(m, norm)
    return mx.stack(
        [
            mx.abs(length - base).mean(),
            mx.where(lives & (length > 0), moved, 0.0).mean(),
            mx.where(lives, gain, mx.inf).min(),
            mx.where(lives, gain, -mx.inf).max(),
        ]
    )


def summarise(layers: Mapping[str, LayerGeometry]) -> dict[str, float]:
    """Summarize the layers as fields of a `StepReport`.

    The fields are means and ranges over layers, and the correlation of ΔM and ΔD. The
    correlation is omitted if ΔM or ΔD does not vary.
    """
    if not layers:
        return {}
    values = list(layers.values())
    delta_m = np.array([layer.delta_m for layer in values])
    delta_d = np.array([layer.delta_d for layer in values])
    fields = {
        "delta_m": float(delta_m.mean()),
        "delta_d": float(delta_d.mean()),
        "gain_min": min(layer.gain_min for layer in values),
        "gain_max": max(layer.gain_max for layer in values),
    }
    if len(values) > 2 and np.ptp(delta_m) > 0 and np.ptp(delta_d) > 0:
        fields["correlation"] = float(np.corrcoef(delta_m, delta_d)[0, 1])
    return fields
