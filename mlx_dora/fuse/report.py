"""Reports what fusing did to each layer, and how much of its update survived."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from mlx_dora.notebook import Shown

# Below this share or cosine, repacking into few bits logs a warning.
_KEPT_WELL = 0.9


@dataclass(frozen=True, kw_only=True)
class Survival:
    """How much of an update D = W' − W0 is in the fused change F = W'' − W0.

    Attributes:
        exact_square: ‖D‖².
        product: ⟨D, F⟩.
        kept_square: ‖F‖².
        row_square: Sum of the squared relative errors of the rows' norms.
        rows: Number of rows.
    """

    exact_square: float = 0.0
    product: float = 0.0
    kept_square: float = 0.0
    row_square: float = 0.0
    rows: int = 0

    def __add__(self, other: "Survival") -> "Survival":
        """Combine both, as if they were one layer."""
        return Survival(
            exact_square=self.exact_square + other.exact_square,
            product=self.product + other.product,
            kept_square=self.kept_square + other.kept_square,
            row_square=self.row_square + other.row_square,
            rows=self.rows + other.rows,
        )

    @property
    def kept(self) -> float:
        """Share of the update that is kept: ⟨D, F⟩/‖D‖², 1 if all is kept."""
        # An untrained adapter has nothing to lose.
        return self.product / self.exact_square if self.exact_square else 1.0

    @property
    def cosine(self) -> float:
        """Cosine of D and F; noise from rounding and packing reduces it below 1."""
        if not self.exact_square:
            return 1.0
        length = math.sqrt(self.exact_square * self.kept_square)
        return self.product / length if length else 0.0

    @property
    def row_norm_error(self) -> float:
        """Root mean square of the relative errors of the rows' norms."""
        return math.sqrt(self.row_square / self.rows) if self.rows else 0.0

    def survives(self, keep: float) -> bool:
        """Return whether share and cosine are both at least `keep`."""
        return min(self.kept, self.cosine) >= keep


@dataclass(frozen=True, kw_only=True)
class FusedLayer:
    """A fused layer.

    Attributes:
        path: Full path of the layer.
        dtype: Dtype of the unpacked fused weight, such as ``"bfloat16"``.
        bits: Bits per packed value; None if the weight is dense.
        bytes_before: Size of the base module.
        bytes_after: Size of the fused module, including its low-rank part if any.
        survival: How much of the update is kept.
        plain: How much packing with the base's own bits would keep, if that was tried
            and was not enough.
    """

    path: str
    dtype: str
    bits: int | None
    bytes_before: int
    bytes_after: int
    survival: Survival
    plain: Survival | None = None

    @property
    def kept(self) -> float:
        """See `Survival.kept`."""
        return self.survival.kept

    @property
    def cosine(self) -> float:
        """See `Survival.cosine`."""
        return self.survival.cosine

    def line(self) -> str:
        """Return the layer as a line of text."""
        form = self.dtype if self.bits is None else f"{self.bits} bits"
        text = (
            f"{self.path}: {form}, {self.kept:.1%} of the update kept (cosine "
            f"{self.cosine:.3f}, row norms off by {self.survival.row_norm_error:.1e}), "
            f"{self.bytes_before:,} -> {self.bytes_after:,} bytes"
        )
        if self.plain is not None:
            text += (
                f"; with the base's own bits {self.plain.kept:.1%} (cosine "
                f"{self.plain.cosine:.3f})"
            )
        return text


@dataclass(frozen=True, kw_only=True, repr=False)
class FuseReport(Shown):
    """Report of a fuse, layer by layer."""

    layers: tuple[FusedLayer, ...]

    @property
    def bytes_before(self) -> int:
        """Total size of the base modules."""
        return sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        """Total size of the fused modules."""
        return sum(layer.bytes_after for layer in self.layers)

    @property
    def total(self) -> Survival:
        """Combined survival of all layers."""
        return sum_survivals(layer.survival for layer in self.layers)

    @property
    def plain(self) -> Survival | None:
        """Combined survival with the base's own bits; None if it was not measured."""
        if all(layer.plain is None for layer in self.layers):
            return None
        return sum_survivals(layer.plain or layer.survival for layer in self.layers)

    @property
    def lossy(self) -> tuple[FusedLayer, ...]:
        """Packed layers that lost a tenth of their update or added much noise."""
        return tuple(
            layer
            for layer in self.layers
            if layer.bits is not None and not layer.survival.survives(_KEPT_WELL)
        )

    def details(self) -> list[str]:
        """Return one line per layer."""
        return [layer.line() for layer in self.layers]

    def lines(self) -> list[str]:
        """Return the total as text."""
        total, dtypes = self.total, sorted({layer.dtype for layer in self.layers})
        lines = [
            f"Fused {len(self.layers)} layers ({', '.join(dtypes)}): {total.kept:.1%} "
            f"of the update kept (cosine {total.cosine:.3f}), {self.bytes_before:,} "
            f"bytes before, {self.bytes_after:,} after."
        ]
        if (plain := self.plain) is not None:
            lines.append(
                f"Packed with the base's own bits it would be {plain.kept:.1%} "
                f"(cosine {plain.cosine:.3f})."
            )
        return lines

    def facts(self) -> dict[str, Any]:
        """Return the number of layers and the totals."""
        return {name: v for name, v in self.to_dict().items() if name != "layers"}

    def table(self) -> list[dict[str, Any]]:
        """Return the layers, the least kept first."""
        layers = self.to_dict()["layers"]
        return sorted(layers, key=lambda layer: layer["kept"])

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "kept": self.total.kept,
            "cosine": self.total.cosine,
            "row_norm_error": self.total.row_norm_error,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "layers": [
                {
                    "path": layer.path,
                    "dtype": layer.dtype,
                    "bits": layer.bits,
                    "kept": layer.kept,
                    "cosine": layer.cosine,
                    "row_norm_error": layer.survival.row_norm_error,
                    "bytes_before": layer.bytes_before,
                    "bytes_after": layer.bytes_after,
                    "kept_with_base_bits": layer.plain and layer.plain.kept,
                }
                for layer in self.layers
            ],
        }


def sum_survivals(parts: Iterable[Survival]) -> Survival:
    """Combine the survival of several layers."""
    return sum(parts, start=Survival())
