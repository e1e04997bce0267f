r"""Mean squared gradients of linear modules, from their inputs and output gradients.

A matrix applied to inputs X, with gradients D of its outputs, has the gradient
:math:`G = D^\top X`, whether it is dense, packed or adapted. The row sums of
:math:`G \circ G` need only :math:`X X^\top`, not an array of the weight's size.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_dora.adapters.keys import blocks
from mlx_dora.adapters.surgery import put_modules
from mlx_dora.data.batches import Batch, Examples, batches_once
from mlx_dora.data.counts import RowCounts
from mlx_dora.evaluate.cross_entropy import sample_targets, summed_loss
from mlx_dora.evaluate.loss import eval_mode, marked_targets
from mlx_dora.layers import weight_of
from mlx_dora.merge.fisher.config import FisherConfig
from mlx_dora.progress import Progress

logger = logging.getLogger(__name__)


class _Watched(nn.Module):
    """Wraps a linear module: records its inputs and adds zeros to its output."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        # The underscore keeps these from being parameters.
        self._zeros: mx.array | None = None
        self._seen: list[mx.array] = []

    def __call__(self, x: mx.array) -> mx.array:
        y = self.inner(x)
        if self._zeros is None:
            return y
        rows, tokens, _ = self._zeros.shape
        if x.shape[:-1] not in ((rows, tokens), (rows * tokens,)):
            self._seen.append(x)  # refused later, by shape
            return y
        self._seen.append(x.reshape(rows, tokens, -1))
        return y + self._zeros.reshape(y.shape).astype(y.dtype)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "inner" not in self:
                raise
            return getattr(self["inner"], name)


@dataclass
class SquaredGradients:
    """Computes squared gradients in passes over the batches, within a memory limit.

    Attributes:
        model: A model with or without an adapter.
        data: Rows of the data.
        paths: Paths of linear modules.
        config: How much of the data to use, which targets, and the granularity.
        progress: Progress callback.
        rows: Number of rows that have a target.
        tokens: Number of target tokens in them.
    """

    model: nn.Module
    data: Examples
    paths: list[str]
    config: FisherConfig
    progress: Progress | None

    def __post_init__(self) -> None:
        config, counts = self.config, RowCounts()
        batches = batches_once(
            self.data,
            config.batch_size,
            config.max_seq_length,
            config.num_batches,
            counts,
        )
        self._batches = list(batches)
        if line := counts.describe(config.max_seq_length):
            logger.warning("%s", line)
        modules = dict(self.model.named_modules())
        self._shapes = {path: _shape(modules[path]) for path in self.paths}
        self._places = max(tokens.size for tokens, _ in self._batches)
        self.rows = sum(batch.shape[0] for batch, _ in self._batches)
        self.tokens = sum(
            int(marked_targets(marks, batch.shape[1] - 1).sum())
            for batch, marks in self._batches
        )

    def matrices(self) -> Iterator[tuple[str, mx.array]]:
        """Yield the path and information of each module, pass by pass."""
        groups = self._groups()
        if len(groups) > 1:
            logger.warning(
                "%d passes over the data, to stay under the memory limit", len(groups)
            )
        total = len(groups) * len(self._batches)
        for group in groups:
            sums = {path: mx.zeros(self._sum_shape(path)) for path in group}
            with _differentiable(self.model), _watching(self.model, group) as watched:
                for number, batch in enumerate(self._batches):
                    self._add(sums, watched, batch, number)
                    if self.progress is not None:
                        self.progress("fisher", total, 1)
            mx.clear_cache()
            while sums:
                path = next(iter(sums))
                yield path, sums.pop(path) / self.rows

    def _sum_shape(self, path: str) -> tuple[int, ...]:
        shape = self._shapes[path]
        return shape if self.config.granularity == "element" else shape[:1]

    def _groups(self) -> list[list[str]]:
        groups: list[list[str]] = [[]]
        held = 0
        for path in self.paths:
            out, width = self._shapes[path]
            bytes_ = 4 * self._places * (out + width)
            if self.config.granularity == "element":
                bytes_ += 4 * out * width
            if groups[-1] and held + bytes_ > self.config.memory_limit:
                groups.append([])
                held = 0
            groups[-1].append(path)
            held += bytes_
        return groups

    def _add(
        self,
        sums: dict[str, mx.array],
        watched: dict[str, _Watched],
        batch: Batch,
        number: int,
    ) -> None:
        """Add the squared gradients of a batch's rows."""
        tokens, marks = batch
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        mask = marked_targets(marks, targets.shape[1])
        if self.config.labels == "sampled":
            key = mx.random.key(1_000_003 * self.config.seed + number)
            targets = sample_targets(self.model, inputs, key)

        def loss(zeros: list[mx.array]) -> Any:
            for module, zero in zip(watched.values(), zeros, strict=True):
                module._zeros, module._seen = zero, []
            total = summed_loss(self.model, inputs, targets, mask)
            return total, [module._seen for module in watched.values()]

        zeros = [mx.zeros((*inputs.shape, self._shapes[path][0])) for path in watched]
        try:
            (_, seen), slopes = mx.value_and_grad(loss)(zeros)
        finally:
            for module in watched.values():
                module._zeros, module._seen = None, []
        for path, inputs_seen, slope in zip(watched, seen, slopes, strict=True):
            # A module that the model did not call has no information.
            if path not in sums or not inputs_seen:
                continue
            if len(inputs_seen) > 1 or inputs_seen[0].shape[:-1] != inputs.shape:
                del sums[path]
                logger.warning(
                    "%s is not applied exactly once to each token: left out, without "
                    "Fisher information",
                    path,
                )
                continue
            squares = _squared_gradients(
                inputs_seen[0].astype(mx.float32),
                slope.astype(mx.float32),
                self.config.granularity,
            )
            sums[path] = sums[path] + squares
            mx.eval(sums[path])


def _squared_gradients(x: mx.array, slope: mx.array, granularity: str) -> mx.array:
    """Sum G∘G, or its row sums, over the rows of the data.

    Args:
        x: Inputs. Shape ``(rows, tokens, in)``.
        slope: Gradients of the outputs. Shape ``(rows, tokens, out)``.
        granularity: ``"element"`` or ``"row"``.
    """
    out, width, places = slope.shape[-1], x.shape[-1], x.shape[1]
    if granularity == "row" and places * (out + width) < out * width:
        gram = x @ x.swapaxes(1, 2)  # (rows, tokens, tokens)
        return mx.maximum(((gram @ slope) * slope).sum(axis=(0, 1)), 0.0)
    total = None
    for row in range(x.shape[0]):
        square = mx.square(slope[row].T @ x[row])
        square = square if granularity == "element" else square.sum(axis=1)
        total = square if total is None else total + square
        mx.eval(total)
    assert total is not None
    return total


@contextmanager
def _differentiable(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode, but keep every operation differentiable.

    In eval mode some blocks (gated delta nets) use kernels without gradients. So blocks
    are in train mode, with their dropout in eval mode.
    """
    with eval_mode(model):
        for _, block in blocks(model):
            block.train()
            for _, module in block.named_modules():
                if isinstance(module, nn.Dropout | nn.Dropout2d | nn.Dropout3d):
                    module.eval()
        yield


@contextmanager
def _watching(model: nn.Module, paths: Sequence[str]) -> Iterator[dict[str, _Watched]]:
    """Wrap each module in a `_Watched` within the context."""
    modules = dict(model.named_modules())
    before = [(path, modules[path]) for path in paths]
    watched = {path: _Watched(module) for path, module in before}
    for path, module in before:
        watched[path]._training = module.training
    put_modules(model, list(watched.items()))
    try:
        yield watched
    finally:
        put_modules(model, before)


def _shape(module: nn.Module) -> tuple[int, int]:
    out, width = weight_of(module.get("linear", module)).shape
    return out, width
