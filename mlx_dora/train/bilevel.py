"""BiDoRA: directions trained on some rows, magnitudes on others, by two optimizers.

BiDoRA (arXiv:2410.09758). What is the paper's and what ours: `docs/variants.md`.
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

# Length of the step of a finite difference, as in DARTS (arXiv:1806.09055).
_STEP = 0.01


class Subset:
    """Some of a data set's examples.

    Args:
        data: The data set.
        places: Which of them, in order.
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

    With V the directions' parameters, L their loss and L' the held-out rows':

    .. math:: V' = V - \xi \nabla_V L(V, m), \qquad
        m' = m - \xi \nabla_m L'(V'(m), m)

    The second gradient goes through V', by finite differences as in DARTS
    (arXiv:1806.09055), here around V' as in BiDoRA's own code:

    .. math:: \nabla_m L'(V', m) - \xi\,
        \frac{\nabla_m L(V' + \epsilon v, m) - \nabla_m L(V' - \epsilon v, m)}
        {2 \epsilon}, \qquad v = \nabla_{V'} L'(V', m), \; \epsilon = .01 / \lVert v
        \rVert

    with ξ the learning rate, whatever the optimizer. Four gradients make an update.

    The first level of `levels` trains the directions, the held-out rows of the second
    the magnitudes: one batch of them for each batch of the others.
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
        """The examples that train the directions, and those for the magnitudes.

        Drawn by the seed; ``magnitude_share`` says how many.

        Raises:
            DoRAError: If either would have none.
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
        """The configured optimizer twice: for the magnitudes, and for all else."""
        return optim.MultiOptimizer(
            [build_optimizer(settings), build_optimizer(settings)],
            [lambda name, _: is_magnitude(name)],
        )

    def gradient(self, window: Sequence[Batch]) -> Gradient:
        """Gradient of the loss of `window`; takes as many held-out batches."""
        self._rows = window
        self._held_out = list(islice(self._source, len(window)))
        return super().gradient(window)

    def apply(self, gradient: Gradient) -> None:
        """Change the directions, then the magnitudes.

        The magnitudes stay where their loss or gradient is not finite, or the held-out
        rows have no target; that is logged.
        """
        super().apply(self.part(gradient, is_direction))
        ahead = super().gradient(self._held_out)
        if ahead.tokens and math.isfinite(ahead.loss) and math.isfinite(ahead.norm):
            total = self.hypergradient(ahead)
            if math.isfinite(total.norm):
                self._upper.apply(total)
                return
        logger.warning("magnitudes stay: no finite gradient on the held-out rows")

    def hypergradient(self, ahead: Gradient) -> Gradient:
        """Gradient of the held-out loss by the magnitudes, through the directions.

        Args:
            ahead: Of that loss by all parameters, at the new directions.
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
            mx.random.seed(seed)  # both sides drop the same
            side = super().gradient(self._rows)
            sides.append(_mean(self.part(side, is_magnitude)))
        model.update(here)
        rate = self._optimizer.learning_rate / (2 * size)
        total = tree_map(lambda g, a, b: g - rate * (a - b), first, *sides)
        whole = replace(ahead, total=total, scale=mx.array(1.0))
        return self.part(whole, is_magnitude)


def _mean(gradient: Gradient) -> Any:
    return tree_map(lambda g: g / gradient.scale, gradient.total)
