"""Report on a merge of adapters, layer by layer."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from mlx_dora.adapters.adapter import Adapter
from mlx_dora.errors import printable
from mlx_dora.notebook import Shown


@dataclass(frozen=True, kw_only=True)
class MergedLayer:
    """Report on one merged matrix.

    Attributes:
        path: Full path of the module.
        name: The path with the index of an expert, if any: ``path[3]``.
        inputs: Number of adapters that have it; the others count as the base.
        rank: Rank of the merged update.
        opposed, recomputed, zero, discarded, unknown: As in
            `mlx_dora.merge.adapters.factored.MergedMatrix`.
        logit_error: Relative change of the logits if only this layer is cut; None if
            it was not measured.
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


@dataclass(frozen=True, kw_only=True, repr=False)
class AdapterMerge(Shown):
    """A merged adapter and a report on it.

    Attributes:
        adapter: The merged adapter.
        method: Name of the method.
        layers: Reports on the matrices, in natural order.
        count: Number of inputs.
        logit_error: Relative change of the logits if all layers are cut; None if it
            was not measured.
        settings: Choices besides the method, by option: the space, the rule for
            magnitudes.
        notes: Notes about the settings, one sentence each.
    """

    adapter: Adapter
    method: str
    layers: tuple[MergedLayer, ...]
    count: int
    logit_error: float | None = None
    settings: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def details(self) -> list[str]:
        """One line for each layer with something to report."""
        text = []
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
        return text

    def lines(self) -> list[str]:
        """The summary as text, with the layers if their error was asked for."""
        text = [printable(note) for note in self.notes]
        for what, name in (
            ("rows are opposed", "opposed"),
            ("rows were recomputed densely", "recomputed"),
            ("rows are zero", "zero"),
            ("weights have no Fisher information", "unknown"),
        ):
            counts = [getattr(layer, name) for layer in self.layers]
            if total := sum(counts):
                text.append(f"{total} {what}, in {sum(map(bool, counts))} matrices.")
        worst = max(self.layers, key=lambda layer: layer.discarded)
        if worst.discarded > 0:
            text.append(
                f"The rank cut at most {worst.discarded:.2e} of a matrix's energy "
                f"({worst.name})."
            )
        if self.logit_error is not None:
            text += self.details()
            text.append(f"All layers cut: logits off by {self.logit_error:.2e}")
        ranks = sorted({layer.rank for layer in self.layers})
        span = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        chosen = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        text.append(
            f"Merged {self.count} adapters on {len(self.layers)} matrices by "
            f"{self.method}{f' ({chosen})' if chosen else ''}: rank {span}."
        )
        return text

    def facts(self) -> dict[str, Any]:
        """Return the method and the numbers of inputs and matrices."""
        return {
            "method": self.method,
            "inputs": self.count,
            "matrices": len(self.layers),
        }

    def table(self) -> list[dict[str, Any]]:
        """Return the matrices."""
        return self.to_dict()["layers"]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values, without the adapter."""
        return {
            "method": self.method,
            "settings": dict(self.settings),
            "count": self.count,
            "notes": list(self.notes),
            "logit_error": self.logit_error,
            "layers": [asdict(layer) for layer in self.layers],
        }
