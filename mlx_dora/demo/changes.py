"""Measures how a DoRA adapter changed the length and direction of matrix rows."""

import math
from dataclasses import dataclass

import mlx.nn as nn
import numpy as np

from mlx_dora.adapters.surgery import dora_layers
from mlx_dora.layers import weight_of
from mlx_dora.matrix import row_geometry


@dataclass(frozen=True, kw_only=True)
class MatrixChange:
    """The change of an adapted matrix (DoRA, arXiv:2402.09353, section 3.2).

    Args:
        path: Path of the module.
        delta_m: ΔM, the mean change of a row's length, in units of the weight.
        delta_m_relative: ΔM divided by the mean length of the base's rows.
        delta_d: ΔD, the mean over rows of 1 - cos(angle between old and new row).
        degrees: The mean angle in degrees.
    """

    path: str
    delta_m: float
    delta_m_relative: float
    delta_d: float
    degrees: float


def matrix_changes(model: nn.Module) -> list[MatrixChange]:
    """Return the changes of all adapted matrices, largest change of direction first."""
    changes = []
    for path, layer in dora_layers(model):
        geometry = row_geometry(weight_of(layer.base), layer.adapted())
        mean_norm = float(np.array(geometry.base_norm, dtype=np.float64).mean())
        mean_angle = float(np.array(geometry.angle, dtype=np.float64).mean())
        changes.append(
            MatrixChange(
                path=path,
                delta_m=geometry.mean_delta_m,
                delta_m_relative=geometry.mean_delta_m / mean_norm
                if mean_norm
                else 0.0,
                delta_d=geometry.mean_delta_d,
                degrees=math.degrees(mean_angle),
            )
        )
    return sorted(changes, key=lambda change: change.delta_d, reverse=True)
