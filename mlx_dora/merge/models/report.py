"""Report on a merge of models, tensor by tensor."""

from dataclasses import asdict, dataclass
from typing import Any

from mlx_dora.errors import printable
from mlx_dora.notebook import Shown


@dataclass(frozen=True, kw_only=True)
class MergedTensor:
    """Report on one merged tensor.

    Attributes:
        name: Name of the tensor.
        opposed: Number of rows whose directions cancel; they keep the direction of
            the model with the largest weight.
        packing_error: Relative error from packing it again; None if dense.
        unknown: Number of elements without Fisher information, in a Fisher merge.
    """

    name: str
    opposed: int
    packing_error: float | None
    unknown: int = 0


@dataclass(frozen=True, kw_only=True, repr=False)
class MergeReport(Shown):
    """Report on a merge of models.

    Attributes:
        method: Name of the method.
        models: Folders or Hub ids of the merged models.
        tensors: Reports on the tensors merged in this run.
        resumed: Number of tensors that an earlier, killed run had merged.
        peak_bytes: Peak memory of MLX.
        seconds: Total duration.
        notes: Notes about the settings and inputs, one sentence each.
    """

    method: str
    models: tuple[str, ...]
    tensors: tuple[MergedTensor, ...]
    resumed: int
    peak_bytes: int
    seconds: float
    notes: tuple[str, ...] = ()

    def facts(self) -> dict[str, Any]:
        """Return the method and the numbers of models and tensors."""
        return {
            "method": self.method,
            "models": list(self.models),
            "tensors": len(self.tensors),
            "seconds": self.seconds,
        }

    def table(self) -> list[dict[str, Any]]:
        """Return the tensors."""
        return [asdict(tensor) for tensor in self.tensors]

    def details(self) -> list[str]:
        """One line for each tensor with opposed rows."""
        return [
            f"{tensor.name}: {tensor.opposed} rows opposed"
            for tensor in self.tensors
            if tensor.opposed
        ]

    def lines(self) -> list[str]:
        """The summary as text."""
        text = [printable(note) for note in self.notes]
        if opposed := [tensor.opposed for tensor in self.tensors if tensor.opposed]:
            text.append(
                f"{sum(opposed)} rows in {len(opposed)} tensors point opposite ways "
                "and keep the direction of the model with the largest weight."
            )
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
            text.append(f"{self.resumed} tensors came from an earlier run.")
        text.append(
            f"Merged {len(self.tensors)} tensors of {len(self.models)} models by "
            f"{self.method} in {self.seconds:.1f} s, peak memory "
            f"{self.peak_bytes / 1e6:.0f} MB."
        )
        return text
