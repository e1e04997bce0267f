"""Merges loaded adapters, module by module, by any method."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_dora import openblas
from mlx_dora.adapters.adapter import Adapter, BaseModel, ranks_in
from mlx_dora.adapters.config import DoRAConfig
from mlx_dora.adapters.keys import natural_order
from mlx_dora.adapters.matrices import (
    adapted_modules,
    adapter_tensors,
    named_matrices,
)
from mlx_dora.errors import DoRAError
from mlx_dora.matrix import Adapted, Weight
from mlx_dora.matrix.weight import weight_of
from mlx_dora.merge.adapters.calibrate import (
    calibrated,
    restored,
    with_own_lengths,
)
from mlx_dora.merge.adapters.dense import Options, merge_dense, merge_informed
from mlx_dora.merge.adapters.factored import MergedMatrix, merge_matrix
from mlx_dora.merge.adapters.in_space import merge_in_space
from mlx_dora.merge.adapters.report import AdapterMerge, MergedLayer
from mlx_dora.merge.fisher.information import Fisher
from mlx_dora.merge.methods import MergeMethod
from mlx_dora.merge.methods.calibrations import CALIBRATIONS
from mlx_dora.merge.methods.lengths import LengthRule
from mlx_dora.merge.methods.magnitudes import RULES
from mlx_dora.merge.methods.spaces import SPACES, Space
from mlx_dora.merge.weights import row_weights
from mlx_dora.progress import Progress


@dataclass(frozen=True)
class Job:
    """A merge of loaded adapters.

    Attributes:
        adapters: The N adapters.
        names: Their folders; empty for adapters in memory.
        modules: Modules of the base by path.
        method: The method.
        weights: As `mlx_dora.merge.weights.check_weights` returns them.
        options: Settings of the method.
        fishers: Fisher information of each adapter; empty if not used.
        progress: Called after each module.
    """

    adapters: list[Adapter]
    names: list[str]
    modules: dict[str, nn.Module]
    method: MergeMethod
    weights: Mapping[str, Sequence[np.ndarray]]
    options: Options
    fishers: list[Fisher]
    progress: Progress | None

    @cached_property
    def paths(self) -> list[str]:
        """Paths of the modules that any adapter has, in natural order."""
        every = {path for adapter in self.adapters for path in adapter.paths}
        return sorted(every, key=natural_order)

    @cached_property
    def scale(self) -> float:
        """Multiplier of the merged adapter: the first nonzero scale of the inputs."""
        scales = [adapter.config.scale for adapter in self.adapters]
        return next((scale for scale in scales if scale), 1.0)

    @cached_property
    def shares(self) -> dict[str, np.ndarray]:
        """Weights by path, shape ``(out, N)``; for means each row sums to 1."""
        rows = {path: self.modules[path]["weight"].shape[-2] for path in self.paths}
        return row_weights(self.weights, rows, normalize=self.method.is_mean)

    @cached_property
    def space(self) -> Space | None:
        """The space to merge in; None for a method of rows."""
        chosen = self.options.space
        if chosen is None and self.method.is_exact:
            return None
        return SPACES[chosen or self.method.space]

    @cached_property
    def rule(self) -> LengthRule | None:
        """The rule for magnitudes; None for the method's own."""
        return self.options.rule()

    @cached_property
    def is_thin(self) -> bool:
        """Whether all products have a thin factor, so that one BLAS thread is best."""
        if self.space is None:
            return not any(
                fisher.facts.granularity == "element" for fisher in self.fishers
            )
        return bool(self.space.coordinates)

    def merged(self, rank: int | None) -> AdapterMerge:
        """Merge every module; cut the updates to `rank` if it is not None."""
        with openblas.one_thread() if self.is_thin else nullcontext():
            return self._merged(rank)

    def _merged(self, rank: int | None) -> AdapterMerge:
        adapted = {path: self.modules[path] for path in self.paths}
        inputs = [adapted_modules(adapter, adapted) for adapter in self.adapters]
        tensors: dict[str, mx.array] = {}
        layers: list[MergedLayer] = []
        for path, module in adapted.items():
            columns = [matrices[path] for matrices in inputs]
            tensors |= self._module(path, module, columns, rank, layers)
            if self.progress is not None:
                self.progress("merge", len(adapted), 1)
        note = self.method.note_of(self.options.density)
        return AdapterMerge(
            adapter=self._adapter(tensors),
            method=self.method.name,
            layers=tuple(layers),
            count=len(self.adapters),
            settings=self.options.named,
            notes=() if note is None else (note,),
        )

    def _module(
        self,
        path: str,
        module: nn.Module,
        columns: Sequence[Sequence[Adapted]],
        rank: int | None,
        layers: list[MergedLayer],
    ) -> dict[str, mx.array]:
        """Merge one module, expert by expert, and append reports to `layers`."""
        weight, shares = weight_of(module), self.shares[path]
        have = [a for a in self.adapters if f"{path}.lora_a" in a.tensors]
        parts = []
        named = named_matrices(path, weight)
        for (name, matrix), *inputs in zip(named, *columns, strict=True):
            known = [fisher.read(path, matrix.shape) for fisher in self.fishers]
            try:
                merged = self._matrix(matrix, inputs, shares, known, rank)
            except DoRAError as error:
                raise DoRAError(f"{name}: {error}") from error
            parts.append(merged.tensors)
            layers.append(
                MergedLayer(
                    path=path,
                    name=name,
                    inputs=len(have),
                    rank=merged.rank,
                    opposed=merged.opposed,
                    recomputed=merged.recomputed,
                    zero=merged.zero,
                    discarded=merged.discarded,
                    unknown=merged.unknown,
                )
            )
        return adapter_tensors(path, module, weight, parts)

    def _matrix(
        self,
        weight: Weight,
        inputs: Sequence[Adapted],
        shares: np.ndarray,
        known: Sequence[mx.array | None],
        rank: int | None,
    ) -> MergedMatrix:
        """Merge the adapters of one matrix with weights ``(out, N)``."""
        method, scale, options = self.method, self.scale, self.options
        # Adapters with weight 0 do not count, nor do they share in a space or a rank.
        if used := np.flatnonzero(shares.any(0)).tolist():
            inputs, shares = [inputs[i] for i in used], shares[:, used]
            known = [known[i] for i in used] if known else known
        if method.is_mean:
            m, update = inputs[0].m, inputs[0].update
            is_kept = options.magnitudes is None and rank is None
            if len(inputs) == 1 and is_kept and m is not None:
                up = update.lora_b
                if update.scale != scale:
                    up = up * (update.scale / scale)
                return MergedMatrix(lora_a=update.lora_a, lora_b=up, m=m, scale=scale)
        if options.calibrate is None:
            merged = self._by_method(weight, inputs, shares, known, rank)
        else:
            calibration = CALIBRATIONS[options.calibrate]
            merged = self._by_method(
                weight,
                calibrated(weight, inputs, shares, calibration),
                shares,
                known,
                rank,
            )
            merged = restored(merged, inputs, shares, options.scale)
        if options.magnitudes is not None and RULES[options.magnitudes].of_result:
            merged = with_own_lengths(weight, merged)
        return merged

    def _by_method(
        self,
        weight: Weight,
        inputs: Sequence[Adapted],
        shares: np.ndarray,
        known: Sequence[mx.array | None],
        rank: int | None,
    ) -> MergedMatrix:
        """Merge the adapters of one matrix, calibrated or not, by the method."""
        method, scale, options = self.method, self.scale, self.options
        if method.needs_fisher:
            return merge_informed(
                weight, inputs, shares, known, scale=scale, rank=rank, options=options
            )
        if self.space is None:
            return merge_matrix(
                weight,
                inputs,
                options.scale * shares,
                method=method.name,
                scale=scale,
                rank=rank,
                rule=self.rule,
            )
        if not self.space.coordinates:
            return merge_dense(
                weight,
                inputs,
                shares,
                method=method.name,
                scale=scale,
                rank=rank,
                options=options,
            )
        return merge_in_space(
            weight,
            inputs,
            shares,
            method=method.name,
            space=self.space,
            scale=scale,
            rank=rank,
            options=options,
        )

    def _adapter(self, tensors: dict[str, mx.array]) -> Adapter:
        """Make the adapter of the merged tensors: its config, base and history."""
        bases = [adapter.base for adapter in self.adapters]
        models = {base.model for base in bases} - {None}
        fingerprints = {base.fingerprint for base in bases} - {None}
        config = DoRAConfig(scale=self.scale).with_ranks(ranks_in(tensors))
        return Adapter(
            config=config,
            tensors=tensors,
            base=BaseModel(
                model=models.pop() if len(models) == 1 else None,
                fingerprint=fingerprints.pop() if len(fingerprints) == 1 else None,
            ),
            training={
                "merged": {
                    "method": self.method.name,
                    **self.options.named,
                    "adapters": self.names,
                }
            },
        )

    def only_one(self) -> Adapter | None:
        """The only adapter with nonzero weights in a mean; None for several."""
        if not self.method.is_mean or self.options.magnitudes is not None:
            return None
        used = {
            i for share in self.shares.values() for i in np.flatnonzero(share.any(0))
        }
        return self.adapters[used.pop()] if len(used) == 1 else None
