"""What a merge did, layer by layer."""

from dataclasses import dataclass

from mlx_dora.adapters.adapter import Adapter
from mlx_dora.errors import printable


@dataclass(frozen=True, kw_only=True)
class MergedLayer:
    """What became of one matrix.

    Attributes:
        path: Full path of its module.
        name: The same, with the index of an expert: ``path[3]``.
        inputs: How many of the adapters have it; the others count as the base.
        rank: Rank of its merged update.
        opposed: Rows that keep the heaviest input's direction, the directions of the
            inputs cancelling out.
        recomputed: Rows taken densely because the factored sums cancel.
        zero: Rows that are zero.
        discarded: Share of the update's energy that was cut with the rank.
        unknown: Elements without Fisher information, in a merge by that.
        logit_error: How far cutting this layer alone moves the logits, relative; None
            if it was not measured.
    """

    path: str
    name: str
    inputs: int
    rank: int
    opposed: int
    recomputed: int
    zero: int
    discarded: float
    unknown: int = 0
    logit_error: float | None = None


@dataclass(frozen=True, kw_only=True)
class AdapterMerge:
    """A merged adapter with a report, layer by layer in natural order.

    Attributes:
        adapter: It.
        method: How.
        layers: What became of each matrix.
        count: Number of inputs.
        logit_error: How far cutting all layers moves the logits, relative; None if it
            was not measured.
    """

    adapter: Adapter
    method: str
    layers: tuple[MergedLayer, ...]
    count: int
    logit_error: float | None = None

    def lines(self) -> list[str]:
        """The report as text: a line a layer in which something is to be said."""
        told = []
        for one in self.layers:
            notes = []
            if one.inputs < self.count:
                notes.append(f"in {one.inputs} of {self.count} adapters")
            if one.discarded > 0:
                notes.append(f"{one.discarded:.2e} of the energy cut")
            if one.logit_error is not None:
                notes.append(f"logits off by {one.logit_error:.2e}")
            for what, number in (
                ("opposed", one.opposed),
                ("recomputed densely", one.recomputed),
                ("zero", one.zero),
            ):
                if number:
                    notes.append(f"{number} rows {what}")
            if one.unknown:
                notes.append(f"{one.unknown} weights without Fisher information")
            if notes:
                told.append(f"{one.name}: rank {one.rank}, {', '.join(notes)}")
        if self.logit_error is not None:
            told.append(f"All layers cut: logits off by {self.logit_error:.2e}")
        ranks = sorted({one.rank for one in self.layers})
        span = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        told.append(
            f"Merged {self.count} adapters on {len(self.layers)} matrices by "
            f"{self.method}: rank {span}."
        )
        return told


@dataclass(frozen=True, kw_only=True)
class MergedTensor:
    """What became of one tensor of a model.

    Attributes:
        name: Its name.
        opposed: Rows whose directions cancel: they keep the heaviest model's.
        packing_error: Relative error that packing it again added; None if dense.
        unknown: Elements without Fisher information, in a merge by that.
    """

    name: str
    opposed: int
    packing_error: float | None
    unknown: int = 0


@dataclass(frozen=True, kw_only=True)
class MergeReport:
    """What a merge of models did.

    Attributes:
        method: How.
        models: Folders or Hub ids.
        tensors: Those merged in this run.
        resumed: How many an earlier, killed run had merged.
        peak_bytes: Most memory that MLX held.
        seconds: Whole duration.
        notes: What to say of the settings and inputs, a sentence each.
    """

    method: str
    models: tuple[str, ...]
    tensors: tuple[MergedTensor, ...]
    resumed: int
    peak_bytes: int
    seconds: float
    notes: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """The report as text."""
        told = [printable(note) for note in self.notes]
        told += [
            f"{one.name}: {one.opposed} rows point opposite ways and keep the heaviest "
            "model's direction"
            for one in self.tensors
            if one.opposed
        ]
        if unknown := [one for one in self.tensors if one.unknown]:
            told.append(
                f"{sum(one.unknown for one in unknown)} weights in {len(unknown)} "
                "tensors have no Fisher information and took the weighted mean "
                f"({', '.join(one.name for one in unknown[:5])}"
                f"{', ...' if len(unknown) > 5 else ''})."
            )
        packed = [one for one in self.tensors if one.packing_error is not None]
        if packed:
            worst = max(packed, key=lambda one: one.packing_error or 0.0)
            told.append(
                f"Packing {len(packed)} tensors again added up to "
                f"{worst.packing_error:.2%} error ({worst.name})."
            )
        if self.resumed:
            told.append(f"{self.resumed} tensors were there from an earlier run.")
        told.append(
            f"Merged {len(self.tensors)} tensors of {len(self.models)} models by "
            f"{self.method} in {self.seconds:.1f} s, peak memory "
            f"{self.peak_bytes / 1e6:.0f} MB."
        )
        return told
