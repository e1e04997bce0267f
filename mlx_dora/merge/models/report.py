"""What a merge of models did, tensor by tensor."""

from dataclasses import dataclass

from mlx_dora.errors import printable


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
