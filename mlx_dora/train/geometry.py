"""How far each trained DoRA layer is from its base, while it trains."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_dora.adapters.surgery import dora_layers
from mlx_dora.layers import DoRALayer
from mlx_dora.matrix.low_rank import row_inner
from mlx_dora.matrix.terms import one_minus_cosine, row_gain


@dataclass(frozen=True, kw_only=True)
class LayerGeometry:
    """One layer's change against its base (section 3.2 of DoRA, arXiv:2402.09353).

    Args:
        delta_m: ΔM, mean over rows of ``|‖W'‖ − ‖W0‖|``.
        delta_d: ΔD, mean over rows of ``1 − cos(W', W0)``.
        gain_min: Least g = m/‖W0 + sBA‖ of a row.
        gain_max: Greatest.
    """

    delta_m: float
    delta_d: float
    gain_min: float
    gain_max: float


def measure_geometry(model: nn.Module) -> dict[str, LayerGeometry]:
    """Geometry of every DoRA layer; empty if there is none.

    From the norms, the update's own length and the magnitudes: W0 is read once, for
    the norms, and no adapted weight is built.
    """
    layers = dora_layers(model)
    if not layers:
        return {}
    values = np.array(
        mx.stack([_measure(layer.export()) for _, layer in layers]), np.float64
    )
    return {
        path: LayerGeometry(
            delta_m=row[0], delta_d=row[1], gain_min=row[2], gain_max=row[3]
        )
        for (path, _), row in zip(layers, values.tolist(), strict=True)
    }


def _measure(layer: DoRALayer) -> mx.array:
    base, norm, m = mx.sqrt(layer["_squared_base"]), layer.norm(), layer["m"]
    a, b = (factor.astype(mx.float32) for factor in layer.factors())
    b = b.swapaxes(-1, -2)
    update = row_inner(a, b, a, b)  # ‖BA‖² of each row
    moved = one_minus_cosine(base, norm, abs(layer.scale) * mx.sqrt(update))
    moved = mx.where(m < 0, 2 - moved, moved)
    lives = norm > 0  # a zero row stays zero, whatever its m
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
    """Fields of a `StepReport`: means and range over layers, and the correlation.

    The correlation of ΔM and ΔD over layers is left out where they do not vary.
    """
    if not layers:
        return {}
    values = list(layers.values())
    delta_m = np.array([one.delta_m for one in values])
    delta_d = np.array([one.delta_d for one in values])
    found = {
        "delta_m": float(delta_m.mean()),
        "delta_d": float(delta_d.mean()),
        "gain_min": min(one.gain_min for one in values),
        "gain_max": max(one.gain_max for one in values),
    }
    if len(values) > 2 and np.ptp(delta_m) > 0 and np.ptp(delta_d) > 0:
        found["correlation"] = float(np.corrcoef(delta_m, delta_d)[0, 1])
    return found


def by_layer(layers: Mapping[str, LayerGeometry]) -> dict[str, dict[str, Any]]:
    """The same for each layer, as ``log.jsonl`` keeps it at a checkpoint."""
    return {path: asdict(one) for path, one in layers.items()}
