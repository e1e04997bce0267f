"""An update of the weights, from the gradients of some batches on all processes."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_map_with_path, tree_unflatten

from mlx_dora.data.batches import Batch, Examples, shape_of
from mlx_dora.layers import has_divided, held_norms
from mlx_dora.matrix.sharded import in_order
from mlx_dora.train.config import TrainConfig
from mlx_dora.train.group import check_same_shapes, row_group
from mlx_dora.train.optimizers import build_optimizer

B_NAME = "lora_b"


@dataclass(frozen=True, kw_only=True)
class Gradient:
    """Evaluated gradient of one update, summed over batches and processes.

    Args:
        total: Gradient of the summed loss, a float32 tree; if `scale` is 1, gradient of
            the mean loss.
        scale: Divisor that turns `total` into the mean gradient, a scalar.
        loss: Sum of the losses.
        count: Number of what the losses are summed over: targets, or pairs.
        tokens: Number of targets.
        norm: Norm of the mean gradient over all parameters.
        table: Sum and weight of each metric of the objective, as a flat list.
    """

    total: Any
    scale: mx.array
    loss: float
    count: int
    tokens: int
    norm: float
    table: tuple[float, ...] = ()


def is_up_factor(name: str) -> bool:
    """Whether a parameter is an up projection B."""
    return name.rpartition(".")[2] == B_NAME


def is_magnitude(name: str) -> bool:
    """Whether a parameter is a magnitude."""
    return name.rpartition(".")[2] == "m"


def is_direction(name: str) -> bool:
    """Whether a parameter is not a magnitude."""
    return not is_magnitude(name)


def select(tree: Any, keep: Callable[[str], bool]) -> Any:
    """The part of a tree whose names satisfy `keep`."""
    flat = cast(list[tuple[str, Any]], tree_flatten(tree))
    return tree_unflatten([(name, value) for name, value in flat if keep(name)])


class Stepper:
    """Computes and applies gradients; variants with other updates subclass it.

    Args:
        model: The model to train, in train mode.
        optimizer: From `make_optimizer`, initialized for the model or restored.
        held_out: Batches of each level after the first; empty in plain training.
        loss: Returns the mean loss of a batch and the number of what it is a mean of;
            of some objectives, also the number of targets and a table of metrics (see
            `mlx_dora.train.objectives.objective.Outputs`).
        complete: Adds to the batches of an update what is computed without a gradient;
            or None.
        group: The processes that share each batch.
        settings: Settings of the training.
        noted: Called with the outputs of a batch of a new shape, before they are
            computed; or None.
    """

    @staticmethod
    def levels(data: Examples, settings: TrainConfig) -> Sequence[Examples]:
        """Split the examples into levels; plain training has one level."""
        return [data]

    @staticmethod
    def make_optimizer(settings: TrainConfig) -> optim.Optimizer:
        """Make the configured optimizer."""
        return build_optimizer(settings)

    def __init__(
        self,
        model: nn.Module,
        optimizer: optim.Optimizer,
        held_out: Sequence[Iterator[Batch]] = (),
        *,
        loss: Callable[..., tuple[mx.array, ...]],
        complete: Callable[[Sequence[Batch]], Iterable[Batch]] | None = None,
        group: mx.distributed.Group,
        settings: TrainConfig,
        noted: Callable[[Any], None] | None = None,
    ) -> None:
        self._noted = noted
        self._complete = complete
        self._shapes: set[tuple[int, ...]] = set()
        self._model = model
        self._group = group
        self._row_group = row_group(group, settings.shard)
        self._optimizer = optimizer
        ratio = settings.lora_plus_ratio
        value_and_grad = nn.value_and_grad(model, loss)
        forward = [model.state, mx.random.state]
        changed = [model.state, optimizer.state]

        def differentiate(*batch: mx.array) -> tuple[Any, ...]:
            with in_order():
                (value, count, *more), gradient = value_and_grad(model, *batch)
            return _weighted(value, count), count, gradient, more

        if not settings.packing:  # each packed batch has documents of its own lengths
            differentiate = mx.compile(differentiate, inputs=forward, outputs=forward)

        @mx.compile
        def measure(total: Any, scale: mx.array) -> mx.array:
            squares = mx.array(0.0)
            for value in dict(tree_flatten(total)).values():
                squares = squares + mx.square(value.astype(mx.float32)).sum()
            return mx.sqrt(squares) / scale

        @partial(mx.compile, inputs=changed, outputs=changed)
        def apply(total: Any, scale: mx.array) -> None:
            before = model.trainable_parameters()
            mean = tree_map(lambda g, w: (g / scale).astype(w.dtype), total, before)
            optimizer.update(model, mean)
            if ratio != 1:
                after = model.trainable_parameters()
                model.update(tree_map_with_path(_stretch, before, after))

        def _stretch(name: str, old: mx.array, new: mx.array) -> mx.array:
            # The change of every optimizer is proportional to the learning rate.
            stretches = is_up_factor(name)
            return old + ratio * (new - old) if stretches else new

        self._differentiate = differentiate
        self._measure = measure
        self._apply = apply
        self._limit = settings.max_grad_norm
        self._is_sharded = has_divided(model)

    def gradient(self, window: Sequence[Batch]) -> Gradient:
        """Gradient of the mean loss over all of `window`, on all processes."""
        loss, count, total = mx.array(0.0), mx.array(0), None
        sums: list[mx.array] = []
        is_weighted = len(window) > 1 or self._row_group.size() > 1
        # Norms are constant until the weights change. A pass that needs them only once
        # gets them cheaper from its own products; so does one that recomputes blocks.
        reuses = len(window) > 1 or self._is_sharded
        if self._is_sharded:
            check_same_shapes(window, self._group)
        with held_norms(self._model) if reuses else nullcontext():
            whole = window if self._complete is None else self._complete(window)
            for batch in whole:
                value, size, gradient, more = self._differentiate(*batch)
                shape = shape_of(batch[0])
                if self._noted is not None and shape not in self._shapes:
                    self._shapes.add(shape)
                    self._noted([value, gradient])
                loss, count = loss + value, count + size
                sums = (
                    [a + b for a, b in zip(sums, more, strict=True)] if sums else more
                )
                if is_weighted:
                    new = tree_map(lambda g, n=size: _weighted(g, n), gradient)
                    total = new if total is None else tree_map(mx.add, total, new)
                else:
                    total = gradient
                # Before anything is computed from all gradients, such as their norm:
                # MLX then frees a block's arrays as soon as the block is done.
                mx.eval(total, loss, count, sums)
                mx.eval(mx.random.state)
        if self._group.size() > 1:
            total = nn.average_gradients(total, self._group)
        if self._row_group.size() > 1:
            total = tree_map(lambda g: g * self._row_group.size(), total)
            loss = mx.distributed.all_sum(loss, group=self._group)
            count = mx.distributed.all_sum(count, group=self._group)
            sums = [mx.distributed.all_sum(part, group=self._group) for part in sums]
        scale = (
            mx.maximum(count, 1).astype(mx.float32) if is_weighted else mx.array(1.0)
        )
        norm = self._measure(total, scale)
        mx.eval(total, scale, loss, count, norm, sums)
        tokens, *table = sums or [count]
        return Gradient(
            total=total,
            scale=scale,
            loss=float(loss),
            count=int(count),
            tokens=int(tokens),
            norm=float(norm),
            table=tuple(float(value) for part in table for value in np.ravel(part)),
        )

    def part(self, gradient: Gradient, keep: Callable[[str], bool]) -> Gradient:
        """Restrict a gradient to the parameters whose names satisfy `keep`."""
        total = select(gradient.total, keep)
        norm = self._measure(total, gradient.scale)
        return replace(gradient, total=total, norm=float(norm))

    def apply(self, gradient: Gradient) -> None:
        """Update the weights once with the optimizer."""
        scale = gradient.scale
        if self._limit is not None and gradient.norm > self._limit:
            scale = scale * (gradient.norm / self._limit)
        self._apply(gradient.total, scale)
        mx.eval(self._model.state, self._optimizer.state)

    def after_update(self, gradient: Gradient, before: int, step: int) -> None:
        """Hook for variants, called after the weights have changed; does nothing here.

        Args:
            gradient: The gradient that was applied.
            before: Number of batches before the update.
            step: Number of batches after the update.
        """


def is_due(every: int, before: int, step: int) -> bool:
    """Whether a multiple of `every` lies in the interval (`before`, `step`]."""
    return step // every > before // every


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed MLX's random numbers for a step from the seed, the step and the rank.

    A resumed run thus draws the same numbers, and each process draws its own.
    """
    state = np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)
    mx.random.seed(int(state[0]))


def _weighted(mean: mx.array, count: mx.array) -> mx.array:
    # With mlx-lm's loss, the mean of a batch without targets is 0 / 0.
    return mx.where(count > 0, mean.astype(mx.float32) * count, 0.0)
