"""Dealing out ranks among the layers during training, within a parameter budget.

In the spirit of La-LoRA (doi 10.1016/j.neunet.2025.108095), whose formulas are not
public; what is done here is stated in `docs/variants.md`.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten

from mlx_dora.adapters.surgery import dora_layers
from mlx_dora.data.batches import Batch
from mlx_dora.layers import DoRALayer
from mlx_dora.layers.variants import VariantLinear
from mlx_dora.layers.variants.adaptive import Adaptive
from mlx_dora.train.config import TrainConfig
from mlx_dora.train.stepper import Gradient, Stepper, is_due

logger = logging.getLogger(__name__)

# At most this share of all ranks moves in one round.
_MOVED = 0.1
# A rank moves only to a layer whose least rank is worth so many times as much.
_MARGIN = 2.0


@dataclass(kw_only=True)
class Holder:
    """One layer among those that share the ranks.

    Args:
        cost: Parameters of a rank, in + out.
        active: Which of its ranks are in use. Shape ``(room,)``.
        worth: Of each rank, what the loss would lose without it. Shape ``(room,)``.
    """

    cost: int
    active: np.ndarray
    worth: np.ndarray

    def least(self) -> int:
        """The active rank that is worth least."""
        return int(np.argmin(np.where(self.active, self.worth, np.inf)))


class AdaptiveStepper(Stepper):
    """Moves ranks between layers every ``rank_every`` steps, ``rank_rounds`` times."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: optim.Optimizer,
        held_out: Sequence[Iterator[Batch]] = (),
        *,
        settings: TrainConfig,
        **parts: Any,
    ) -> None:
        super().__init__(model, optimizer, held_out, settings=settings, **parts)
        self._every, self._rounds = settings.rank_every, settings.rank_rounds

    def after_update(self, gradient: Gradient, before: int, step: int) -> None:
        """Move ranks if a round is due."""
        is_over = step >= (self._rounds + 1) * self._every
        if not is_over and is_due(self._every, before, step):
            reallocate(self._model, gradient.total)


def reallocate(model: nn.Module, gradient: Any) -> dict[str, int]:
    """Move ranks from where they are worth little to where they are worth much.

    Args:
        model: A model with `Adaptive` layers, changed in place.
        gradient: Of the loss (any multiple of it), a tree like the trainable
            parameters.

    Returns:
        The ranks afterwards, by path; empty without such layers.
    """
    layers = {
        path: layer
        for path, layer in dora_layers(model)
        if isinstance(layer, VariantLinear) and layer.variant == Adaptive.name
    }
    if not layers:
        return {}
    flat = dict(tree_flatten(gradient))
    holders = {
        path: _holder(layer, flat[f"{path}.lora_b"]) for path, layer in layers.items()
    }
    deal(holders)
    for path, layer in layers.items():
        layer.kind.activate(layer, holders[path].active)
    mx.eval([layer.parameters() for layer in layers.values()])
    ranks = {path: int(one.active.sum()) for path, one in holders.items()}
    logger.info("ranks are now %d to %d", min(ranks.values()), max(ranks.values()))
    return ranks


def _holder(layer: DoRALayer, gradient: Any) -> Holder:
    a, b = (np.array(factor, np.float64) for factor in layer.factors())
    # How far the loss would change to first order if the whole update went.
    contribution = abs((np.array(gradient, np.float64) * b).sum())
    energy = (a**2).sum(0) * (b**2).sum(1)  # ‖B_i A_i‖² of each rank
    share = energy / (energy.sum() or 1.0)
    return Holder(
        cost=a.shape[0] + b.shape[1],
        active=np.array(layer["active"]) > 0,
        worth=contribution * share,
    )


def deal(holders: Mapping[str, Holder]) -> None:
    """Move ranks among holders, in place; never above the parameters of before.

    Each round takes the rank that is worth least a parameter and gives what is freed
    to the layer whose least rank is worth most, which counts half for its next one.
    Every layer keeps a rank. Ties go to the first in the mapping's order.
    """
    total = sum(int(one.active.sum()) for one in holders.values())
    free = 0
    for _ in range(max(1, round(_MOVED * total))):
        givers = [one for one in holders.values() if one.active.sum() > 1]
        takers = [one for one in holders.values() if not one.active.all()]
        if not givers or not takers:
            return
        giver = min(givers, key=_price)
        taker = max(takers, key=_price)
        if giver is taker or _price(taker) <= _MARGIN * _price(giver):
            return
        rank = giver.least()
        giver.active = giver.active.copy()
        giver.active[rank] = False
        free += giver.cost
        while free >= taker.cost and not taker.active.all():
            free -= taker.cost
            half = taker.worth[taker.least()] / 2
            new = int(np.argmin(taker.active))  # the first that is not
            taker.active, taker.worth = taker.active.copy(), taker.worth.copy()
            taker.active[new], taker.worth[new] = True, half


def _price(one: Holder) -> float:
    return float(one.worth[one.least()]) / one.cost
