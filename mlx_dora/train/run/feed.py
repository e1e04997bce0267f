"""The batches of a training, from any step on."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain, islice

import mlx.core as mx

from mlx_dora.data.batches import Batch, Examples
from mlx_dora.data.counts import RowCounts
from mlx_dora.data.schedule import Schedule
from mlx_dora.errors import DoRAError
from mlx_dora.train.config import TrainConfig

MakeBatches = Callable[..., Iterator[Batch]]


class Feed:
    """Endless batches of the training rows, one stream for each level of the stepper.

    Args:
        levels: The training examples of each level; plain training has one level.
        train: Settings of the training.
        make: Makes batches in place of `Schedule`, see `finetune`; None for `Schedule`.

    Raises:
        DoRAError: If `make` is given and the settings count in epochs.
    """

    def __init__(
        self, levels: Sequence[Examples], train: TrainConfig, make: MakeBatches | None
    ) -> None:
        self.counts = RowCounts()
        self._levels, self._make = levels, make
        self._limits = train.batch_size, train.max_seq_length
        self._seed = train.seed
        self._schedules: list[Schedule] = []
        if make is None:
            self._schedules = [
                Schedule(
                    rows,
                    *self._limits,
                    seed=train.seed,
                    packing=train.packing,
                    counts=self.counts,
                )
                for rows in levels
            ]
        elif train.epochs or train.epochs_per_eval:
            raise DoRAError("epochs are those of the training's own batches.")

    def length(self, epochs: int) -> int:
        """Batches in so many passes over the training rows."""
        return self._schedules[0].length(epochs)

    def epoch_ends(self, every: int, iters: int) -> Sequence[int]:
        """The steps up to `iters` after which `every` passes more are complete."""
        return self._schedules[0].ends(every, iters)

    def streams(
        self, step: int, group: mx.distributed.Group
    ) -> tuple[Iterator[Batch], ...]:
        """Each level's batches after the first `step`, this process's share of them.

        Raises:
            DoRAError: If a level has no row with a target.
        """
        if self._make is None:
            place = step, group.rank(), group.size()
            streams = [schedule.batches(*place) for schedule in self._schedules]
        else:
            make = partial(self._make, seed=self._seed, counts=self.counts)
            streams = [
                islice(make(rows, *self._limits), step, None) for rows in self._levels
            ]
        # The first batch is made now, so that unfit data is refused before a step.
        return tuple(chain([next(stream)], stream) for stream in streams)
