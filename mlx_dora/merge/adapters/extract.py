"""A DoRA adapter from a base and a fine-tuned model."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_dora.adapters.adapter import Adapter, BaseModel, ranks_in
from mlx_dora.adapters.config import DoRAConfig
from mlx_dora.adapters.files import save_adapter
from mlx_dora.adapters.fingerprint import base_tensors, fingerprint_of
from mlx_dora.adapters.hosting import load_lazily
from mlx_dora.adapters.key_form import with_key_form
from mlx_dora.adapters.keys import natural_order, resolve_keys
from mlx_dora.adapters.matrices import adapter_tensors, named_matrices
from mlx_dora.adapters.origins import Origins, origins_of
from mlx_dora.adapters.refusals import check_cut
from mlx_dora.errors import DoRAError
from mlx_dora.io.atomic import check_output
from mlx_dora.io.finite import refuse_not_finite
from mlx_dora.kernels import fused_weight
from mlx_dora.layers import dora_class
from mlx_dora.matrix.weight import dense, matrices, weight_of
from mlx_dora.merge.adapters.factor import factor, row_norm
from mlx_dora.merge.adapters.nearest import nearest
from mlx_dora.notebook import Shown
from mlx_dora.progress import Progress

_LEAVES = ("weight", "scales", "biases")


@dataclass(frozen=True, kw_only=True)
class ExtractedLayer:
    """Report on one extracted matrix.

    Attributes:
        path: Full path of the matrix; for an expert, with its index: ``path[3]``.
        rank: Rank of the update.
        discarded: Share of the direction's change that the rank left out.
        error: ‖adapted − tuned‖ over ‖tuned − base‖, Frobenius norms.
    """

    path: str
    rank: int
    discarded: float
    error: float


@dataclass(frozen=True, kw_only=True, repr=False)
class Extraction(Shown):
    """An extracted adapter.

    Attributes:
        adapter: The extracted adapter.
        layers: The changed matrices, in natural order.
        left_out: Changed tensors that the adapter does not cover.
    """

    adapter: Adapter
    layers: tuple[ExtractedLayer, ...]
    left_out: tuple[str, ...]

    def details(self) -> list[str]:
        """One line for each matrix."""
        return [
            f"{layer.path}: rank {layer.rank}, {layer.discarded:.2e} of the energy "
            f"left out, error {layer.error:.2e} of the change"
            for layer in self.layers
        ]

    def lines(self) -> list[str]:
        """The summary as text."""
        text = []
        if self.left_out:
            text.append(f"Changed, but not covered: {', '.join(self.left_out)}")
        worst = max(self.layers, key=lambda layer: layer.error)
        ranks = sorted({layer.rank for layer in self.layers})
        span = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        text.append(
            f"Extracted {len(self.layers)} matrices: rank {span}, error at most "
            f"{worst.error:.2e} of a matrix's change ({worst.path})."
        )
        return text

    def facts(self) -> dict[str, Any]:
        """Return the number of matrices and of changed tensors left out."""
        return {"matrices": len(self.layers), "left_out": len(self.left_out)}

    def table(self) -> list[dict[str, Any]]:
        """Return the matrices."""
        return self.to_dict()["layers"]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values, without the adapter."""
        return {
            "layers": [asdict(layer) for layer in self.layers],
            "left_out": list(self.left_out),
        }


def extract_adapter(
    base: str | Path,
    tuned: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    keys: Sequence[str] | None = None,
    save_path: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Extraction:
    """Make the DoRA adapter that best turns a base into a fine-tuned model.

    Magnitudes are the tuned weights' exact row norms; directions come from a truncated
    SVD. For large matrices it is randomized and reads blocks of rows; its squared error
    is then within 0.1 % of the least possible. Either model may be packed.

    Args:
        base: Folder or Hub id of the base model. The adapter belongs to it.
        tuned: Folder or Hub id of the fine-tuned model.
        rank: Rank of the updates; with `energy`, the largest rank. Limited to
            min(out, in) for each matrix.
        energy: Share of each update's squared norm to keep, above 0 and at most 1.
        keys: Modules to cover, as in `DoRAConfig`; None for all modules in the
            blocks. Unchanged modules are left out.
        save_path: Folder to write the adapter to.
        overwrite: Replace an existing folder.
        progress: Progress callback.

    Raises:
        DoRAError: If the models do not match or do not differ, or an argument is bad.
    """
    _check_size(rank, energy)
    if save_path is not None:
        check_output(save_path, inputs=(base, tuned), overwrite=overwrite)
    start, end = load_lazily(base), load_lazily(tuned)
    before, after = dict(start.named_modules()), dict(end.named_modules())
    paths = resolve_keys(start, keys, -1)
    if missing := [path for path in paths if path not in after]:
        raise DoRAError(f"{tuned} lacks {', '.join(missing[:10])}.")
    _check_modules(before, paths, rank)
    tensors: dict[str, mx.array] = {}
    layers: list[ExtractedLayer] = []
    for path in paths:
        layers += _extract(path, before[path], after[path], rank, energy, tensors)
        _release(before[path], after[path])
        if progress is not None:
            progress("extract", len(paths), 1)
    if not layers:
        raise DoRAError(f"{tuned} does not differ from {base} in any adapted matrix.")
    config = DoRAConfig(scale=1.0).with_ranks(ranks_in(tensors))
    adapter = Adapter(
        config=with_key_form(config, start),
        tensors=tensors,
        base=BaseModel(model=str(base), fingerprint=_fingerprint(base)),
        training={"extracted": {"tuned": str(tuned), "rank": rank, "energy": energy}},
    )
    refuse_not_finite(tensors, "the extracted adapter")
    if save_path is not None:
        save_adapter(adapter, save_path, inputs=(base, tuned), overwrite=overwrite)
    left_out = _left_out(load_lazily(base), load_lazily(tuned), set(paths))
    return Extraction(adapter=adapter, layers=tuple(layers), left_out=left_out)


def _fingerprint(base: str | Path) -> str:
    """The base's fingerprint; frees the model first, so that one tensor is held."""
    model = load_lazily(base)
    tensors, origins = base_tensors(model), origins_of(model)
    del model
    return fingerprint_of(tensors, origins)


def _check_size(rank: int | None, energy: float | None) -> None:
    if rank is None and energy is None:
        raise DoRAError("give rank, energy (a share of each update to keep), or both.")
    if rank is not None and (type(rank) is not int or rank < 1):
        raise DoRAError(f"rank must be a whole number of at least 1, got {rank!r}.")
    if energy is not None and not 0 < energy <= 1:
        raise DoRAError(f"energy must be above 0 and at most 1, got {energy!r}.")


def _check_modules(
    modules: Mapping[str, nn.Module], paths: Sequence[str], rank: int | None
) -> None:
    for path in paths:
        dora_class(modules[path])
    if rank is not None and paths:
        check_cut(modules, paths, rank)


def _extract(
    path: str,
    before: nn.Module,
    after: nn.Module,
    rank: int | None,
    energy: float | None,
    tensors: dict[str, mx.array],
) -> list[ExtractedLayer]:
    """Add a changed module's adapter to `tensors`; report on each changed matrix."""
    base, tuned = weight_of(before), weight_of(after)
    if base.shape != tuned.shape:
        raise DoRAError(
            f"{path}: the fine-tuned weight has shape {tuned.shape}, expected the "
            f"base's shape {base.shape}."
        )
    layers, parts = [], []
    pairs = zip(named_matrices(path, base), matrices(tuned), strict=True)
    for (name, old), new in pairs:
        update = nearest(old, new, rank=rank, energy=energy)
        if update is not None:
            made, error = update
            parts.append(made.tensors)
            layers.append(
                ExtractedLayer(
                    path=name, rank=made.rank, discarded=made.discarded, error=error
                )
            )
            continue
        weight, goal = dense(old).astype(mx.float32), dense(new).astype(mx.float32)
        if not mx.isfinite(goal).all() or not mx.isfinite(weight).all():
            raise DoRAError(f"{name} holds NaN or inf.")
        change = _length(goal - weight)
        magnitude = row_norm(goal)
        if not change:  # an unchanged expert of a changed module
            a, b = mx.zeros((weight.shape[1], 1)), mx.zeros((1, weight.shape[0]))
            parts.append({"lora_a": a, "lora_b": b, "m": magnitude})
            continue
        made = factor(weight, goal, magnitude, scale=1.0, rank=rank, energy=energy)
        adapted = fused_weight(weight, made.lora_a, made.lora_b, 1.0, made.m)
        error = _length(adapted - goal) / change
        parts.append(made.tensors)
        lost = made.discarded
        layers.append(
            ExtractedLayer(path=name, rank=made.rank, discarded=lost, error=error)
        )
    if layers:
        tensors |= adapter_tensors(path, before, base, parts)
    return layers


def _release(*modules: nn.Module) -> None:
    """Drop the weights of modules that were read, so that they can be freed."""
    for module in modules:
        for leaf in _LEAVES:
            module.pop(leaf, None)


def _length(matrix: mx.array) -> float:
    """Frobenius norm, without overflow for any float32 matrix."""
    return float(np.linalg.norm(np.array(row_norm(matrix), np.float64)))


def _left_out(start: nn.Module, end: nn.Module, covered: set[str]) -> tuple[str, ...]:
    """Names of changed tensors that the adapter does not cover.

    Consumes the models, which hold one tensor each at a time.
    """
    origins = origins_of(start), origins_of(end)
    before, after = base_tensors(start), base_tensors(end)
    for model in (start, end):
        _release(*(module for _, module in model.named_modules()))
    inside = {f"{path}.{leaf}" for path in covered for leaf in _LEAVES}
    names = sorted((before.keys() | after.keys()) - inside, key=natural_order)
    changed = []
    for name in names:
        first, second = before.pop(name, None), after.pop(name, None)
        if first is None or second is None or not _are_equal(first, second, *origins):
            changed.append(name)
    return tuple(changed)


def _are_equal(
    first: mx.array, second: mx.array, before: Origins, after: Origins
) -> bool:
    """Whether two lazy arrays are equal, compared in their files if possible."""
    if first.shape != second.shape:
        return False
    stored = before.stored(first), after.stored(second)
    if first.dtype != second.dtype or stored[0] is None or stored[1] is None:
        return bool(mx.array_equal(first, second))
    return stored[0].holds_same_bytes(stored[1])
