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
        text = [printable(note) for note in self.notes]
        text += [
            f"{tensor.name}: {tensor.opposed} rows point opposite ways and keep the "
            "direction of the model with the largest weight"
            for tensor in self.tensors
            if tensor.opposed
        ]
        if unknown := [tensor for tensor in self.tensors if tensor.unknown]:
            text.append(
                f"{sum(tensor.unknown for tensor in unknown)} weights in "
                f"{len(unknown)} tensors have no Fisher information and "
                "took the weighted mean "
                f"({', '.join(tensor.name for tensor in unknown[:5])}"
                f"{', ...' if len(unknown) > 5 else ''})."
            )
        packed = [tensor for tensor in self.tensors if tensor.packing_error is not None]
        if packed:
            worst = max(packed, key=lambda tensor: tensor.packing_error or 0.0)
            text.append(
                f"Packing {len(packed)} tensors again added up to "
                f"{worst.packing_error:.2%} error ({worst.name})."
            )
        if self.resumed:
            text.append(f"{self.resumed} tensors were there from an earlier run.")
        text.append(
            f"Merged {len(self.tensors)} tensors of {len(self.models)} models by "
            f"{self.method} in {self.seconds:.1f} s, peak memory "
            f"{self.peak_bytes / 1e6:.0f} MB."
        )
        return text
