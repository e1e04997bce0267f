"""What a merge did, layer by layer."""

from dataclasses import dataclass

from mlx_dora.adapters.adapter import Adapter


@dataclass(frozen=True, kw_only=True)
class MergedLayer:
    """What became of one matrix.

    Attributes:
        path: Its full path.
        inputs: How many of the adapters have it; the others count as the base.
        rank: Rank of its merged update.
        opposed: Rows that keep the heaviest input's direction, the directions of the
            inputs cancelling out.
        recomputed: Rows taken densely because the factored sums cancel.
        zero: Rows that are zero.
        discarded: Share of the update's energy that was cut with the rank.
    """

    path: str
    inputs: int
    rank: int
    opposed: int
    recomputed: int
    zero: int
    discarded: float


@dataclass(frozen=True, kw_only=True)
class AdapterMerge:
    """A merged adapter with a report, layer by layer in natural order."""

    adapter: Adapter
    method: str
    layers: tuple[MergedLayer, ...]
    count: int

    def lines(self) -> list[str]:
        """The report as text: a line a layer in which something is to be said."""
        told = []
        for one in self.layers:
            notes = []
            if one.inputs < self.count:
                notes.append(f"in {one.inputs} of {self.count} adapters")
            if one.discarded > 0:
                notes.append(f"{one.discarded:.2e} of the energy cut")
            for what, number in (
                ("opposed", one.opposed),
                ("recomputed densely", one.recomputed),
                ("zero", one.zero),
            ):
                if number:
                    notes.append(f"{number} rows {what}")
            if notes:
                told.append(f"{one.path}: rank {one.rank}, {', '.join(notes)}")
        ranks = sorted({one.rank for one in self.layers})
        span = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        told.append(
            f"Merged {self.count} adapters on {len(self.layers)} matrices by "
            f"{self.method}: rank {span}."
        )
        return told
