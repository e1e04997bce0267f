"""Compares two versions of a model's weights, one block of rows at a time."""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_dora.adapters.keys import natural_order
from mlx_dora.analyze.metrics import MatrixAnalysis, measure
from mlx_dora.analyze.result import AdaptationAnalysis
from mlx_dora.decomposition import Array, as_array
from mlx_dora.errors import DoRAError
from mlx_dora.io.blocks import READABLE, read_blocks
from mlx_dora.io.checkpoint import Checkpoint
from mlx_dora.io.derived import head_and_embedding
from mlx_dora.matrix.geometry import blocks_geometry
from mlx_dora.progress import Progress

Weights = Mapping[str, Array] | str | Path
"""Named MLX or NumPy arrays, or a model folder."""

logger = logging.getLogger(__name__)

_BLOCK = 1 << 16
_LISTED = 5


def analyze_finetune(
    base: Weights,
    tuned: Weights,
    *,
    spectrum: bool = False,
    progress: Progress | None = None,
) -> AdaptationAnalysis:
    """Analyze how fine-tuning changed the matrices of a model.

    Matrices that are equal in both models are listed as unchanged and count in no
    result. Matrices are the two-dimensional float tensors. Vectors are skipped. Tensors
    with more axes (convolutions, stacked experts) are skipped with a warning.

    Args:
        base: Weights before fine-tuning.
        tuned: Weights after fine-tuning, with the same names and shapes.
        spectrum: Compute singular values of each update as well. This takes memory
            quadratic and time cubic in the shorter side of the matrix.
        progress: Called after each matrix.

    Raises:
        DoRAError: If names or shapes differ, there is nothing to compare, or a weight
            holds NaN or inf.
    """
    before, after = _Source(base, "the base"), _Source(tuned, "the tuned model")
    names = _shared(before, after)
    if before.deeper:
        logger.warning("skipped, not matrices: %s", ", ".join(before.deeper))
    layers: list[MatrixAnalysis] = []
    unchanged: list[str] = []
    for name in names:
        blocks = _Pairs(zip(before.blocks(name), after.blocks(name), strict=True))
        geometry = blocks_geometry(blocks)
        if not geometry.is_finite:
            raise DoRAError(f"{name} holds NaN or inf in {before} or {after}.")
        path = name.removesuffix(".weight")
        if blocks.are_equal:
            unchanged.append(path)
        else:
            values = _singular_values(before, after, name) if spectrum else np.zeros(0)
            layers.append(measure(path, geometry, values))
        if progress is not None:
            progress("analyze", len(names), 1)
    return AdaptationAnalysis(
        layers=layers, source=str(after), base=str(before), unchanged=unchanged
    )


class _Pairs:
    """Blocks of both models, which notes whether all of them were equal."""

    def __init__(self, pairs: Iterator[tuple[np.ndarray, np.ndarray]]) -> None:
        self._pairs = pairs
        self.are_equal = True

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for before, after in self._pairs:
            self.are_equal = self.are_equal and np.array_equal(before, after)
            yield before, after


class _Source:
    """Named matrices, from a dict or a folder, that are read in blocks of rows."""

    def __init__(self, weights: Weights, name: str) -> None:
        self._name = str(weights) if isinstance(weights, str | Path) else name
        self._arrays: Mapping[str, mx.array] | None = None
        self._files: Checkpoint | None = None
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.deeper: list[str] = []  # more than two axes
        if isinstance(weights, Mapping):
            self._arrays = {k: as_array(k, value) for k, value in weights.items()}
            for key, value in self._arrays.items():
                if mx.issubdtype(value.dtype, mx.floating):
                    self._take(key, value.shape)
            packed = [key for key in weights if key.endswith(".scales")]
        elif not isinstance(weights, str | Path):
            raise TypeError(
                f"{name}: weights must map names to arrays, or be a model folder, got "
                f"{type(weights).__name__}."
            )
        else:
            self._files = files = Checkpoint(weights)
            for key in files.names:
                info = files.info(key)
                if info.dtype in READABLE:
                    self._take(key, info.shape)
            packed = [key for key in files.names if key.endswith(".scales")]
        if packed:
            raise DoRAError(
                f"{self} is quantized ({packed[0]}), but only dense models can be "
                "compared; dequantize it first, or analyze the adapter."
            )

    def _take(self, name: str, shape: tuple[int, ...]) -> None:
        if 0 in shape:  # nothing to compare
            return
        if len(shape) == 2:
            self.shapes[name] = shape
        elif len(shape) > 2:
            self.deeper.append(name)

    def __str__(self) -> str:
        return self._name

    def is_copied_head(self, name: str) -> bool:
        """Return whether a matrix is the output head and equals the input embedding."""
        pair = head_and_embedding(self.shapes)
        if pair is None or pair[0] != name or len({*map(self.shapes.get, pair)}) > 1:
            return False
        both = zip(*map(self.blocks, pair), strict=True)
        return all(np.array_equal(head, embedding) for head, embedding in both)

    def blocks(self, name: str) -> Iterator[np.ndarray]:
        if self._files is not None:
            yield from read_blocks(self._files, name)
            return
        assert self._arrays is not None
        array = self._arrays[name]
        step = max(1, _BLOCK // max(array.shape[1], 1))
        for start in range(0, array.shape[0], step):
            yield np.array(array[start : start + step].astype(mx.float32))


def _shared(before: _Source, after: _Source) -> list[str]:
    problems = []
    for source, other in ((before, after), (after, before)):
        missing = [name for name in source.shapes if name not in other.shapes]
        for name in [name for name in missing if source.is_copied_head(name)]:
            logger.warning("skipped %s of %s: a copy of the embedding", name, source)
            missing.remove(name)
            del source.shapes[name]
        if missing:
            more = f" and {len(missing) - _LISTED} more" * (len(missing) > _LISTED)
            problems.append(f"{other} lacks {', '.join(missing[:_LISTED])}{more}")
    problems += [
        f"{name} has shape {shape} in {before}, {after.shapes[name]} in {after}"
        for name, shape in before.shapes.items()
        if after.shapes.get(name, shape) != shape
    ][:_LISTED]
    if problems:
        raise DoRAError(f"the models do not fit together: {'; '.join(problems)}.")
    if not before.shapes:
        raise DoRAError(f"{before} holds no float matrices.")
    return sorted(before.shapes, key=natural_order)


def _singular_values(before: _Source, after: _Source, name: str) -> np.ndarray:
    """Return the singular values of the difference, from its smaller Gram matrix."""
    rows, width = before.shapes[name]
    gram = np.zeros((width, width))
    kept = []
    for a, b in zip(before.blocks(name), after.blocks(name), strict=True):
        delta = b.astype(np.float64) - a
        if width <= rows:
            gram += delta.T @ delta
        else:
            kept.append(delta)
    if kept:
        whole = np.concatenate(kept)
        gram = whole @ whole.T
    return np.sqrt(np.maximum(np.linalg.eigvalsh(gram)[::-1], 0.0))
