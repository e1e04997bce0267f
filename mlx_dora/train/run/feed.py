"""Streams of training batches that can start at any step."""

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
    """Endless streams of training batches, one for each level of the stepper.

    Args:
        levels: The training examples of each level; plain training has one level.
        train: Settings of the training.
        make: Makes the batches instead of `Schedule`, see `finetune`; may be None.
        processes: Number of processes that share each batch.
        unit: Number of consecutive examples that stay together in a batch; None for
            single rows.
        passes: How often the batches of an update are repeated, in consecutive updates.
        alike: Give every process a batch of the same shape.

    Raises:
        DoRAError: If `make` is given and the settings count in epochs or tokens, or
            the batches are of units.
    """

    def __init__(
        self,
        levels: Sequence[Examples],
        train: TrainConfig,
        make: MakeBatches | None,
        processes: int = 1,
        unit: int | None = None,
        passes: int = 1,
        *,
        alike: bool = False,
    ) -> None:
        self.counts = RowCounts()
        self._levels, self._make, self._alike = levels, make, alike
        self._limits = train.batch_size, train.max_seq_length
        self._seed = train.seed
        self._passes, self._window = passes, train.grad_accumulation_steps
        self._schedules: list[Schedule] = []
        if make is None:
            self._schedules = [
                Schedule(
                    rows,
                    *self._limits,
                    seed=train.seed,
                    packing=train.packing,
                    batch_tokens=train.batch_tokens,
                    ranks=processes,
                    unit=unit,
                    counts=self.counts,
                )
                for rows in levels
            ]
        elif unit is not None:
            raise DoRAError(
                f"custom batches are for objective sft, not {train.objective}: leave "
                "them out."
            )
        elif train.epochs or train.epochs_per_eval:
            raise DoRAError(
                "epochs and epochs_per_eval cannot count custom batches: set iters and "
                "steps_per_eval instead."
            )
        elif train.batch_tokens is not None:
            raise DoRAError("batch_tokens does not apply to custom batches.")

    def describe(self) -> str | None:
        """Describe the batches of the first epoch; None for custom batches."""
        if not self._schedules:
            return None
        usage = self._schedules[0].usage()
        count = len(usage.shapes)
        return (
            f"Batches: {usage.batches:,} an epoch, of {count} "
            f"{'shape' if count == 1 else 'shapes'}, {usage.padding:.1%} padding"
        )

    def length(self, epochs: int) -> int:
        """Number of batches in `epochs` passes over the training rows."""
        return self._schedules[0].length(epochs) * self._passes

    def epoch_ends(self, every: int, iters: int) -> Sequence[int]:
        """The steps up to `iters` at which another `every` passes are complete."""
        return self._schedules[0].ends(every, iters)

    def shapes(self, group: mx.distributed.Group) -> Iterator[tuple[int, ...]]:
        """Shapes of this process's batches of the first level, from step 0 on.

        Custom batches are made for the training alone, so every width is expected.
        """
        if self._make is None:
            place = 0, group.rank(), group.size()
            batches = self._schedules[0].batches(*place, alike=self._alike)
            return (batch[0].shape for batch in batches)
        rows, longest = self._limits
        widths = (1 << power for power in range(longest.bit_length()))
        return ((rows, width + 1) for width in widths)

    def streams(
        self, step: int, group: mx.distributed.Group
    ) -> tuple[Iterator[Batch], ...]:
        """This process's share of each level's batches after the first `step`.

        Raises:
            DoRAError: If a level has no row with a target.
        """
        assert step % (self._passes * self._window) == 0 or self._passes == 1
        step //= self._passes
        if self._make is None:
            place = step, group.rank(), group.size()
            streams = [
                schedule.batches(*place, alike=self._alike)
                for schedule in self._schedules
            ]
        else:
            make = partial(self._make, seed=self._seed, counts=self.counts)
            streams = [
                islice(make(rows, *self._limits), step, None) for rows in self._levels
            ]
        # Make the first batch now, so that bad data is refused before the first step.
        whole = (chain([next(stream)], stream) for stream in streams)
        return tuple(map(self._repeated, whole))

    def _repeated(self, stream: Iterator[Batch]) -> Iterator[Batch]:
        if self._passes == 1:
            return stream
        windows = iter(lambda: [*islice(stream, self._window)], [])
        return chain.from_iterable(
            chain(*[window] * self._passes) for window in windows
        )
