"""The training methods to compare, and ranks that give them equally many parameters."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import isqrt
from typing import Any

import mlx.nn as nn

from mlx_dora.adapters.config import DoRAConfig
from mlx_dora.adapters.keys import last_blocks
from mlx_dora.adapters.surgery import adaptable_paths
from mlx_dora.layers import weight_of

ADAPTER_RATES = (5e-4, 2e-3, 8e-3)
FEW_NUMBERS_RATES = (2e-3, 8e-3, 3.2e-2)


@dataclass(frozen=True, kw_only=True)
class Method:
    """A training method.

    Attributes:
        kind: The ``fine_tune_type``.
        settings: Settings for `DoRAConfig`.
        per_row: Trained numbers per row, besides the factors.
        per_matrix: Trained numbers per matrix, besides the factors.
        shared: Number of (rank, rank) matrices that the modules of a block share.
        is_square: Whether the low-rank part is only a (rank, rank) matrix per module.
        has_rank: Whether it has a low-rank part, whose rank can be chosen.
        rates: Learning rates to choose from; every method has equally many.
    """

    kind: str = "dora"
    settings: Mapping[str, Any] = field(default_factory=dict)
    per_row: int = 1
    per_matrix: int = 0
    shared: int = 0
    is_square: bool = False
    has_rank: bool = True
    rates: tuple[float, ...] = ADAPTER_RATES


METHODS = {
    "lora": Method(kind="lora", per_row=0),
    "dora": Method(),
    "pissa": Method(settings={"init": "pissa"}),
    "doran": Method(settings={"variant": "doran"}, per_matrix=1),
    "map": Method(
        settings={"variant": "map"},
        per_row=0,
        per_matrix=2,
        rates=FEW_NUMBERS_RATES,
    ),
    "prediag": Method(settings={"variant": "prediag"}),
    "adaptive": Method(settings={"variant": "adaptive"}),  # counted by its active ranks
    "magnitude": Method(
        settings={"variant": "magnitude"}, has_rank=False, rates=FEW_NUMBERS_RATES
    ),
    "full": Method(kind="full", has_rank=False, rates=(2e-5, 8e-5, 3.2e-4)),
    "doran-aux": Method(settings={"variant": "doran-aux"}, per_matrix=1, shared=2),
    "edora": Method(settings={"variant": "edora"}, is_square=True),
    "bidora": Method(settings={"variant": "bidora"}),
}


def equal_ranks(model: nn.Module, method: Method, dora: DoRAConfig) -> DoRAConfig:
    """Return a config with as many trainable parameters as `dora`, or slightly fewer.

    Ranks are raised module by module, as far as whole ranks allow.
    """
    config = replace(dora, **method.settings)
    if not method.has_rank:
        return config
    modules = dict(model.named_modules())
    paths = adaptable_paths(model, config)
    shapes = {path: weight_of(modules[path]).shape for path in paths}
    budget = sum(dora.rank * (o + i) + o for o, i in shapes.values())
    budget -= sum(method.per_row * o + method.per_matrix for o, _ in shapes.values())
    budget -= method.shared * dora.rank**2 * len(last_blocks(model, dora.num_layers))
    if method.is_square:
        pattern = {
            path: min(isqrt(dora.rank * (o + i)), o, i)
            for path, (o, i) in shapes.items()
        }
        return replace(config, rank=max(pattern.values()), rank_pattern=pattern)
    one_rank = sum(o + i for o, i in shapes.values())
    rank = max(1, budget // one_rank)
    left, pattern = budget - rank * one_rank, dict.fromkeys(paths, rank)
    for path in paths:
        if sum(shapes[path]) <= left:
            pattern[path], left = rank + 1, left - sum(shapes[path])
    return replace(config, rank=max(pattern.values()), rank_pattern=pattern)
