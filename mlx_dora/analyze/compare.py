"""Compares adapters of one base with each other, matrix by matrix, in factored form."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_dora import openblas
from mlx_dora.adapters.adapter import Adapter
from mlx_dora.adapters.keys import natural_order
from mlx_dora.adapters.labels import short_names
from mlx_dora.adapters.matrices import adapted_matrices, named_matrices
from mlx_dora.analyze.adapter import (
    check_fit,
    load_base,
    named_adapter,
)
from mlx_dora.analyze.agreement import PairAgreement, comparison_advice, mean_agreement
from mlx_dora.analyze.guidance import Advice
from mlx_dora.analyze.metrics import number
from mlx_dora.analyze.result import SCHEMA, VERSION
from mlx_dora.analyze.spectrum import rank_holding
from mlx_dora.analyze.statistics import pearson
from mlx_dora.errors import DoRAError
from mlx_dora.layers import weight_of
from mlx_dora.matrix import Adapted, Factors, Spectrum, Weight, row_grams
from mlx_dora.matrix.low_rank import side_by_side
from mlx_dora.notebook import Shown
from mlx_dora.progress import Progress


@dataclass(frozen=True, kw_only=True, repr=False)
class AdapterComparison(Shown):
    """Agreement of adapters of one base, for every pair on every matrix they share.

    Attributes:
        adapters: Names of the adapters, in the order given.
        adapter_ranks: Rank that each adapter records.
        pairs: One entry for each matrix and pair.
        ranks: For each matrix, the rank at which the combined updates keep 99 % of
            their energy.
    """

    adapters: list[str]
    adapter_ranks: list[int]
    pairs: list[PairAgreement]
    ranks: dict[str, int]

    @property
    def labels(self) -> list[str]:
        """Short names of the adapters: the ends of their paths, as far as they differ.

        Adapters with equal paths are numbered.
        """
        return short_names(self.adapters)

    @property
    def layers(self) -> list[PairAgreement]:
        """An alias of `pairs`. For two adapters it has one entry per matrix."""
        return self.pairs

    @property
    def correlation(self) -> float:
        """Mean correlation of the adapters' Δm over rows, where it is defined."""
        values = [pair.delta_m_correlation for pair in self.pairs]
        known = [value for value in values if np.isfinite(value)]
        return float(np.mean(known)) if known else float("nan")

    def matrix(self, measure: str = "update_cosine") -> np.ndarray:
        """Return the energy-weighted mean of a measure for all pairs, shape ``(N, N)``.

        Entries without a shared matrix are NaN. The diagonal compares each adapter with
        itself.
        """
        count = len(self.adapters)
        itself = 0.0 if measure == "sign_conflict" else 1.0
        values = np.full((count, count), np.nan)
        np.fill_diagonal(values, itself)
        for i in range(count):
            for k in range(i + 1, count):
                own = [
                    pair for pair in self.pairs if (pair.first, pair.second) == (i, k)
                ]
                if own:
                    values[i, k] = values[k, i] = mean_agreement(own, measure)
        return values

    @property
    def conflicts(self) -> list[PairAgreement]:
        """Pairs whose updates have a negative cosine, lowest first."""
        opposed = [pair for pair in self.pairs if pair.update_cosine < 0]
        return sorted(opposed, key=lambda pair: pair.update_cosine)

    @property
    def guidance(self) -> list[Advice]:
        """Suggested merge method, weights and rank, with reasons."""
        rank = max(self.ranks.values(), default=0)
        return comparison_advice(self.pairs, self.labels, rank)

    def facts(self) -> dict[str, Any]:
        """Return the adapters, the number of matrices and the mean cosine."""
        return {
            "adapters": self.adapters,
            "matrices": len({pair.name for pair in self.pairs}),
            "update_cosine": mean_agreement(self.pairs, "update_cosine"),
        }

    def table(self) -> list[dict[str, Any]]:
        """Return the pairs of adapters on each matrix, largest conflict first."""
        return [
            {
                "matrix": pair.name,
                "pair": f"{pair.first + 1}-{pair.second + 1}",
                "cosine": pair.update_cosine,
                "reads": pair.input_overlap,
                "writes": pair.output_overlap,
                "disturbs first": pair.disturbs_first,
                "disturbs second": pair.disturbs_second,
            }
            for pair in sorted(self.pairs, key=lambda pair: pair.update_cosine)
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return the versioned JSON form; see ``docs/analysis.md``."""
        names = ("update_cosine", "direction_cosine", "input_overlap", "output_overlap")
        return {
            "schema": SCHEMA,
            "version": VERSION,
            "kind": "comparison",
            "adapters": self.adapters,
            "labels": self.labels,
            "adapter_ranks": self.adapter_ranks,
            "matrices": {
                name: [[number(v) for v in row] for row in self.matrix(name)]
                for name in (*names, "sign_conflict")
            },
            "pairs": [pair.to_dict() for pair in self.pairs],
            "ranks": self.ranks,
            "guidance": [advice.to_dict() for advice in self.guidance],
        }


@openblas.one_thread()
def compare_adapters(
    adapters: Sequence[Adapter | str | Path],
    model: nn.Module | str | Path | None = None,
    *,
    activations: Mapping[str, mx.array] | None = None,
    check_base: bool = True,
    progress: Progress | None = None,
) -> AdapterComparison:
    """Compare adapters of one base: where they agree and where they interfere.

    Each expert counts as a separate matrix, named like ``path[3]``.

    Args:
        adapters: At least two DoRA or LoRA adapters, or their folders.
        model: The base: a module, a folder or a Hub id; None for the first base that
            an adapter records.
        activations: Map from names of matrices to real inputs, shape
            ``(tokens, in)``, on which to measure interference. Without them, the inputs
            are spread evenly over the input directions of the disturbed adapter.
        check_base: Refuse an adapter that was trained on another base.
        progress: Called after each matrix.

    Raises:
        DoRAError: If an adapter or the base is missing, they do not fit together, fewer
            than two adapters are given, or no two share a matrix.
    """
    if len(adapters) < 2:
        raise DoRAError(f"give at least two adapters to compare, got {len(adapters)}.")
    sources = [named_adapter(a, f"adapter {i + 1}") for i, a in enumerate(adapters)]
    loaded, names = [adapter for adapter, _ in sources], [name for _, name in sources]
    base, is_ours = load_base(model, loaded)
    check_fit(base, loaded, names, check_base)
    modules = dict(base.named_modules())
    paths = sorted({p for adapter in loaded for p in adapter.paths}, key=natural_order)
    pairs: list[PairAgreement] = []
    ranks: dict[str, int] = {}
    for path in paths:
        here = [
            i for i, adapter in enumerate(loaded) if f"{path}.lora_a" in adapter.tensors
        ]
        columns = [adapted_matrices(loaded[i], path, modules[path]) for i in here]
        named = named_matrices(path, weight_of(modules[path]))
        for (name, weight), *adapted in zip(named, *columns, strict=True):
            inputs = None if activations is None else activations.get(name)
            if len(here) > 1:
                pairs += _compare_matrix(name, weight, here, adapted, inputs)
            together = side_by_side([adapter.update.float64() for adapter in adapted])
            ranks[name] = rank_holding(together.spectrum().values, 0.99)
        if is_ours:
            modules[path].clear()
        if progress is not None:
            progress("compare", len(paths), 1)
    if not pairs:
        raise DoRAError("no two of the adapters adapt the same matrix.")
    return AdapterComparison(
        adapters=names,
        adapter_ranks=[adapter.config.rank for adapter in loaded],
        pairs=pairs,
        ranks=ranks,
    )


def _compare_matrix(
    name: str,
    weight: Weight,
    here: Sequence[int],
    adapted: Sequence[Adapted],
    inputs: mx.array | None,
) -> list[PairAgreement]:
    updates = [adapter.update for adapter in adapted]
    grams = row_grams(weight, updates)
    factors = [update.float64() for update in updates]
    spaces = [factor.spectrum() for factor in factors]
    lengths = grams.norm
    signs = np.ones_like(lengths)
    changes = lengths - grams.base_norm[:, None]
    for column, adapter in enumerate(adapted):
        if adapter.m is not None:
            magnitude = np.array(adapter.m.astype(mx.float32), np.float64)
            signs[:, column] = np.where(magnitude < 0, -1.0, 1.0)
            changes[:, column] = np.abs(magnitude) - grams.base_norm
    pairs = []
    for x in range(len(here)):
        for y in range(x + 1, len(here)):
            product = lengths[:, x] * lengths[:, y]
            inner = grams.inner[:, x, y] * signs[:, x] * signs[:, y]
            cosine = inner[product > 0] / product[product > 0]
            rows = factors[x].inner(factors[y])
            own = [factors[i].inner(factors[i]) for i in (x, y)]
            sizes = np.sqrt(np.maximum(own[0] * own[1], 0.0))
            row_cosine = np.divide(
                rows, sizes, out=np.zeros_like(rows), where=sizes > 0
            )
            both = changes[:, x] * changes[:, y]
            moved = np.abs(both)
            energies = own[0].sum(), own[1].sum()
            whole = float(np.sqrt(energies[0] * energies[1]))
            base = float(np.linalg.norm(grams.base_norm))
            pairs.append(
                PairAgreement(
                    name=name,
                    first=here[x],
                    second=here[y],
                    update_cosine=float(rows.sum() / whole) if whole > 0 else 0.0,
                    row_update_cosine=row_cosine,
                    direction_cosine=float(cosine.mean()) if cosine.size else 0.0,
                    delta_m_correlation=pearson(changes[:, x], changes[:, y]),
                    sign_conflict=float(moved[both < 0].sum() / moved.sum())
                    if moved.sum() > 0
                    else 0.0,
                    size_ratio=float(np.sqrt(energies[1] / energies[0]))
                    if energies[0] > 0
                    else float("nan"),
                    relative_size=math.sqrt(whole) / base if base > 0 else 0.0,
                    input_overlap=_overlap(spaces[x].inputs, spaces[y].inputs),
                    output_overlap=_overlap(spaces[x].outputs, spaces[y].outputs),
                    disturbs_first=_disturbance(factors, spaces, x, y, inputs),
                    disturbs_second=_disturbance(factors, spaces, y, x, inputs),
                    energy=whole,
                )
            )
    return pairs


def _overlap(first: np.ndarray, second: np.ndarray) -> float:
    """Return the mean squared cosine of the principal angles of two bases.

    Both are orthonormal, shapes ``(n, k1)`` and ``(n, k2)``.
    """
    if not min(first.shape[1], second.shape[1]):
        return 0.0
    cosines = np.linalg.svd(first.T @ second, compute_uv=False)
    return float(np.square(cosines).mean())


def _disturbance(
    factors: Sequence[Factors],
    spaces: Sequence[Spectrum],
    own: int,
    other: int,
    inputs: mx.array | None,
) -> float:
    """Return the relative size of the other update's output, on inputs of `own`."""
    outputs = []
    for update in (factors[own], factors[other]):
        if inputs is None:
            h = spaces[own].inputs.T @ update.a
        else:
            h = np.array(inputs.astype(mx.float32), np.float64) @ update.a
        outputs.append(np.linalg.norm(h @ update.b.T))
    return float(outputs[1] / outputs[0]) if outputs[0] > 0 else float("nan")
