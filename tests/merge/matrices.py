"""Random adapters of one matrix, and what they mean in float64."""

import mlx.core as mx
import numpy as np

from mlx_dora.matrix import Adapted, LowRank, Weight
from mlx_dora.merge.adapters.factored import MergedMatrix
from tests.checks import to_numpy


def make_weight(
    rows: int = 40, width: int = 96, bits: int | None = None, seed: int = 0
) -> tuple[Weight, np.ndarray]:
    """A base weight, dense or packed, and its exact values."""
    from mlx_dora.kernels import QuantizedWeight

    rng = np.random.default_rng(seed)
    weight = mx.array(rng.standard_normal((rows, width)).astype(np.float32))
    if bits is None:
        return weight, to_numpy(weight)
    packed, scales, biases = mx.quantize(weight, 32, bits)
    made = QuantizedWeight(
        weight=packed, scales=scales, biases=biases, group_size=32, bits=bits
    )
    return made, to_numpy(made.dequantize())


def make_input(
    dense: np.ndarray, rank: int, scale: float, seed: int, size: float = 0.1
) -> Adapted:
    """A simulated trained adapter: random factors, magnitudes away from the norms."""
    rng = np.random.default_rng(100 + seed)
    rows, width = dense.shape
    lora_a = rng.standard_normal((width, rank)).astype(np.float32)
    lora_b = (size * rng.standard_normal((rank, rows))).astype(np.float32)
    adapted = dense + scale * (lora_a.astype(float) @ lora_b.astype(float)).T
    m = np.linalg.norm(adapted, axis=1) * (1 + 0.1 * rng.standard_normal(rows))
    update = LowRank(lora_a=mx.array(lora_a), lora_b=mx.array(lora_b), scale=scale)
    return Adapted(update=update, m=mx.array(m.astype(np.float32)))


def adapted(dense: np.ndarray, adapter: Adapted | MergedMatrix) -> np.ndarray:
    """W' of an adapter by Eq. 5 of DoRA, in float64."""
    update = adapter.update if isinstance(adapter, Adapted) else adapter
    low_rank = to_numpy(update.lora_a) @ to_numpy(update.lora_b)
    rows = dense + update.scale * low_rank.T
    if adapter.m is None:
        return rows
    norm = np.linalg.norm(rows, axis=1, keepdims=True)
    return to_numpy(adapter.m)[:, None] * rows / np.where(norm > 0, norm, 1.0)
