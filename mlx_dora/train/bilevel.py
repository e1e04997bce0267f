"""BiDoRA: trains directions and magnitudes on separate rows, with two optimizers.

See BiDoRA (arXiv:2410.09758); `docs/variants.md` lists the differences from the paper.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_map

from mlx_dora.data.batches import Batch, Examples
from mlx_dora.data.targets import Example
from mlx_dora.errors import DoRAError
from mlx_dora.train.config import TrainConfig
from mlx_dora.train.optimizers import build_optimizer
from mlx_dora.train.stepper import (
    Gradient,
    Stepper,
    is_direction,
    is_magnitude,
    select,
)

logger = logging.getLogger(__name__)

# Step length of the finite difference, as in DARTS (arXiv:1806.09055).
_STEP = 0.01


class Subset:
    """A subset of a data set's examples.

    Args:
        data: The data set.
        places: Indices of the examples, in order.
    """

    def __init__(self, data: Examples, places: Sequence[int]) -> None:
        self._data = data
        self._places = places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int, /) -> Example:
        return self._data[self._places[index]]


class BilevelStepper(Stepper):
    r"""A `Stepper` whose updates have two levels.

    Let V be the parameters of the directions, m the magnitudes, L the loss on the
    training rows and L' the loss on the held-out rows:

    .. math:: V' = V - \xi \nabla_V L(V, m), \qquad
        m' = m - \xi \nabla_m L'(V'(m), m)

    The second gradient is taken through V', by finite differences as in DARTS
    (arXiv:1806.09055), but around V' as in BiDoRA's own code:

    .. math:: \nabla_m L'(V', m) - \xi\,
        \frac{\nabla_m L(V' + \epsilon v, m) - \nabla_m L(V' - \epsilon v, m)}
        {2 \epsilon}, \qquad v = \nabla_{V'} L'(V', m), \; \epsilon = .01 / \lVert v
        \rVert

    where ξ is the learning rate, for every optimizer. An update needs four gradients.

    The first level of `levels` trains the directions. The second level, the held-out
    rows, trains the magnitudes, with one batch for each batch of the first level.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: optim.Optimizer,
        held_out: Sequence[Iterator[Batch]] = (),
        **parts: Any,
    ) -> None:
        assert isinstance(optimizer, optim.MultiOptimizer)
        upper, lower = optimizer.optimizers
        super().__init__(model, lower, **parts)
        self._upper = Stepper(model, upper, **parts)
        (self._source,) = held_out
        self._rows: Sequence[Batch] = ()
        self._held_out: Sequence[Batch] = ()

    @staticmethod
    def levels(data: Examples, settings: TrainConfig) -> Sequence[Examples]:
        """Split the examples into those for the directions and for the magnitudes.

        The split is random; ``magnitude_share`` is the fraction for the magnitudes.

        Raises:
            DoRAError: If either part would be empty.
        """
        count = round(settings.magnitude_share * len(data))
        if not 0 < count < len(data):
            raise DoRAError(
                "variant bidora needs rows for directions and for magnitudes: "
                f"magnitude_share {settings.magnitude_share} of {len(data)} rows is "
                f"{count}."
            )
        order = np.random.default_rng(settings.seed).permutation(len(data)).tolist()
        return Subset(data, sorted(order[count:])), Subset(data, sorted(order[:count]))

    @staticmethod
    def make_optimizer(settings: TrainConfig) -> optim.Optimizer:
        """Make two configured optimizers: for the magnitudes, and for the rest."""
        return optim.MultiOptimizer(
            [build_optimizer(settings), build_optimizer(settings)],
            [lambda name, _: is_magnitude(name)],
        )

    def gradient(self, window: Sequence[Batch]) -> Gradient:
        """Gradient of the loss on `window`; draws as many held-out batches."""
        self._rows = window
        self._held_out = list(islice(self._source, len(window)))
        return super().gradient(window)

    def apply(self, gradient: Gradient) -> None:
        """Update the directions, then the magnitudes.

        If the held-out loss or gradient is not finite, or the held-out rows have no
        target, the magnitudes stay unchanged and a warning is logged.
        """
        super().apply(self.part(gradient, is_direction))
        ahead = super().gradient(self._held_out)
        if ahead.count and math.isfinite(ahead.loss) and math.isfinite(ahead.norm):
            total = self.hypergradient(ahead)
            if math.isfinite(total.norm):
                self._upper.apply(total)
                return
        logger.warning("magnitudes unchanged: no finite gradient on the held-out rows")

    def hypergradient(self, ahead: Gradient) -> Gradient:
        """Gradient of the held-out loss with respect to m, through the directions.

        Args:
            ahead: Gradient of that loss with respect to all parameters, at the new
                directions.
        """
        model = self._model
        first = _mean(self.part(ahead, is_magnitude))
        toward = self.part(ahead, is_direction)
        if toward.norm == 0:
            return self.part(ahead, is_magnitude)
        size, v = _STEP / toward.norm, _mean(toward)
        here = select(model.trainable_parameters(), is_direction)
        seed = int(mx.random.randint(0, 2**31 - 1))
        sides = []
        for step in (size, -size):
            model.update(tree_map(lambda p, g, s=step: p + s * g, here, v))
            mx.random.seed(seed)  # same dropout masks on both sides
            side = super().gradient(self._rows)
            sides.append(_mean(self.part(side, is_magnitude)))
        model.update(here)
        rate = self._optimizer.learning_rate / (2 * size)
        total = tree_map(lambda g, a, b: g - rate * (a - b), first, *sides)
        whole = replace(ahead, total=total, scale=mx.array(1.0))
        return self.part(whole, is_magnitude)


def _mean(gradient: Gradient) -> Any:
    return tree_map(lambda g: g / gradient.scale, gradient.total)
