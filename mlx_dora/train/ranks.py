"""Reallocates ranks among the layers during training, within a parameter budget.

Inspired by La-LoRA (doi 10.1016/j.neunet.2025.108095), whose formulas are not public;
`docs/variants.md` states the method used here.
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

# Maximum fraction of all ranks that move in one round.
_MOVED = 0.1
# A rank moves only if the receiving layer's least valuable rank is worth this many
# times as much.
_MARGIN = 2.0


@dataclass(kw_only=True)
class Holder:
    """The ranks of one layer.

    Args:
        cost: Parameters per rank, in + out.
        active: Whether each rank is in use. Shape ``(room,)``.
        worth: Estimated contribution of each rank to the loss. Shape ``(room,)``.
    """

    cost: int
    active: np.ndarray
    worth: np.ndarray

    def least(self) -> int:
        """Index of the active rank with the smallest worth."""
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
    """Move ranks from layers where they are worth little to layers where they matter.

    Args:
        model: A model with `Adaptive` layers, changed in place.
        gradient: Gradient of the loss (or a multiple of it), a tree like the trainable
            parameters.

    Returns:
        The new ranks by path; empty if the model has no such layers.
    """
    layers = {
        path: layer
        for path, layer in dora_layers(model)
        if isinstance(layer, VariantLinear) and layer.kind.name == Adaptive.name
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
    ranks = {path: int(holder.active.sum()) for path, holder in holders.items()}
    logger.info("ranks are now %d to %d", min(ranks.values()), max(ranks.values()))
    return ranks


def _holder(layer: DoRALayer, gradient: Any) -> Holder:
    a, b = (np.array(factor, np.float64) for factor in layer.factors())
    # First-order change of the loss if the whole update were removed.
    contribution = abs((np.array(gradient, np.float64) * b).sum())
    energy = (a**2).sum(0) * (b**2).sum(1)  # ‖B_i A_i‖² of each rank
    share = energy / (energy.sum() or 1.0)
    return Holder(
        cost=a.shape[0] + b.shape[1],
        active=np.array(layer["active"]) > 0,
        worth=contribution * share,
    )


def deal(holders: Mapping[str, Holder]) -> None:
    """Move ranks among holders, in place, without adding parameters.

    Each move removes the rank with the smallest worth per parameter, and gives the
    freed parameters to the layer whose least valuable rank has the largest. The worth
    of a new rank is half that of the least valuable rank. Every layer keeps at least
    one rank. Ties go to the first layer in the mapping's order.
    """
    total = sum(int(holder.active.sum()) for holder in holders.values())
    free = 0
    for _ in range(max(1, round(_MOVED * total))):
        givers = [h for h in holders.values() if h.active.sum() > 1]
        takers = [h for h in holders.values() if not h.active.all()]
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
            new = int(np.argmin(taker.active))  # the first inactive rank
            taker.active, taker.worth = taker.active.copy(), taker.worth.copy()
            taker.active[new], taker.worth[new] = True, half


def _price(holder: Holder) -> float:
    return float(holder.worth[holder.least()]) / holder.cost
