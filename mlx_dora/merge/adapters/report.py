"""What a merge of adapters did, layer by layer."""

from collections.abc import Sequence
from dataclasses import dataclass

from mlx_dora.adapters.adapter import Adapter
from mlx_dora.errors import printable
from mlx_dora.merge.adapters.factored import MergedMatrix


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
        adapter: The merged adapter.
        method: Name of the method.
        layers: What became of each matrix.
        count: Number of inputs.
        logit_error: How far cutting all layers moves the logits, relative; None if it
            was not measured.
        notes: What to say of the settings, a sentence each.
    """

    adapter: Adapter
    method: str
    layers: tuple[MergedLayer, ...]
    count: int
    logit_error: float | None = None
    notes: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """The report as text: a line a layer in which something is to be said."""
        text = [printable(note) for note in self.notes]
        for layer in self.layers:
            notes = []
            if layer.inputs < self.count:
                notes.append(f"in {layer.inputs} of {self.count} adapters")
            if layer.discarded > 0:
                notes.append(f"{layer.discarded:.2e} of the energy cut")
            if layer.logit_error is not None:
                notes.append(f"logits off by {layer.logit_error:.2e}")
            for what, number in (
                ("opposed", layer.opposed),
                ("recomputed densely", layer.recomputed),
                ("zero", layer.zero),
            ):
                if number:
                    notes.append(f"{number} rows {what}")
            if layer.unknown:
                notes.append(f"{layer.unknown} weights without Fisher information")
            if notes:
                text.append(f"{layer.name}: rank {layer.rank}, {', '.join(notes)}")
        if self.logit_error is not None:
            text.append(f"All layers cut: logits off by {self.logit_error:.2e}")
        ranks = sorted({layer.rank for layer in self.layers})
        span = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        text.append(
            f"Merged {self.count} adapters on {len(self.layers)} matrices by "
            f"{self.method}: rank {span}."
        )
        return text


def layer_report(
    path: str, name: str, merged: MergedMatrix, adapters: Sequence[Adapter]
) -> MergedLayer:
    """What became of one matrix of a module that `path` names."""
    return MergedLayer(
        path=path,
        name=name,
        inputs=sum(f"{path}.lora_a" in adapter.tensors for adapter in adapters),
        rank=merged.rank,
        opposed=merged.opposed,
        recomputed=merged.recomputed,
        zero=merged.zero,
        discarded=merged.discarded,
        unknown=merged.unknown,
    )
