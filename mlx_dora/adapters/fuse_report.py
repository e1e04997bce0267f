"""What fusing did to each layer, and how much of its update survived."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

# Below this share, or cosine, a fuse back into few bits is worth a warning.
_KEPT_WELL = 0.9


@dataclass(frozen=True, kw_only=True)
class Survival:
    """How much of an update D = W' − W0 is in what replaced W0, F = W'' − W0.

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
        """Both together, as if they were one layer."""
        return Survival(
            exact_square=self.exact_square + other.exact_square,
            product=self.product + other.product,
            kept_square=self.kept_square + other.kept_square,
            row_square=self.row_square + other.row_square,
            rows=self.rows + other.rows,
        )

    @property
    def kept(self) -> float:
        """Share of the update that is left: its projection, 1 if all of it is."""
        # An untrained adapter has nothing to lose.
        return self.product / self.exact_square if self.exact_square else 1.0

    @property
    def cosine(self) -> float:
        """Between D and F; below 1 by what rounding and packing add as noise."""
        if not self.exact_square:
            return 1.0
        length = math.sqrt(self.exact_square * self.kept_square)
        return self.product / length if length else 0.0

    @property
    def row_norm_error(self) -> float:
        """Root mean square of the relative errors of the rows' norms."""
        return math.sqrt(self.row_square / self.rows) if self.rows else 0.0

    def survives(self, keep: float) -> bool:
        """Whether share and cosine are both at least `keep`."""
        return min(self.kept, self.cosine) >= keep


@dataclass(frozen=True, kw_only=True)
class FusedLayer:
    """One layer that was fused.

    Attributes:
        path: Its full path.
        dtype: Of the fused weight, unpacked: ``"bfloat16"``.
        bits: Bits a weight if it is packed, None if it is dense.
        bytes_before: Size of the base module.
        bytes_after: Size of the fused module, with what is kept beside it.
        survival: How much of its update is left.
        plain: The same for packing with the base's own bits, where that was tried and
            was not enough.
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
        """The layer as a line of text."""
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


@dataclass(frozen=True, kw_only=True)
class FuseReport:
    """What a fuse did, layer by layer."""

    layers: tuple[FusedLayer, ...]

    @property
    def bytes_before(self) -> int:
        """Size of the base modules together."""
        return sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        """Size of the fused modules together."""
        return sum(layer.bytes_after for layer in self.layers)

    @property
    def total(self) -> Survival:
        """All layers' updates as one."""
        return sum_survivals(layer.survival for layer in self.layers)

    @property
    def plain(self) -> Survival | None:
        """All layers, had they been packed with the base's own bits; if tried."""
        if all(layer.plain is None for layer in self.layers):
            return None
        return sum_survivals(layer.plain or layer.survival for layer in self.layers)

    @property
    def lossy(self) -> tuple[FusedLayer, ...]:
        """Packed layers that lost a tenth of their update, or buried it in noise."""
        return tuple(
            layer
            for layer in self.layers
            if layer.bits is not None and not layer.survival.survives(_KEPT_WELL)
        )

    def lines(self) -> list[str]:
        """The report as text: a line a layer, and the total."""
        total, dtypes = self.total, sorted({layer.dtype for layer in self.layers})
        lines = [layer.line() for layer in self.layers]
        lines.append(
            f"Fused {len(self.layers)} layers ({', '.join(dtypes)}): {total.kept:.1%} "
            f"of the update kept (cosine {total.cosine:.3f}), {self.bytes_before:,} "
            f"bytes before, {self.bytes_after:,} after."
        )
        if (plain := self.plain) is not None:
            lines.append(
                f"Packed with the base's own bits it would be {plain.kept:.1%} "
                f"(cosine {plain.cosine:.3f})."
            )
        return lines

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
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
    """Several layers' updates as one."""
    return sum(parts, start=Survival())
