"""Settings for fusing packed weights."""

from dataclasses import dataclass, field
from typing import Literal

from mlx_dora.errors import DoRAError

_MODES = ("requantize", "lossless", "dequantize")
_SCALES = ("float32", "float16")


@dataclass(frozen=True, kw_only=True)
class FuseConfig:
    """Settings for fusing the layers of a quantized base.

    Attributes:
        mode: ``requantize`` repacks an adapted layer with the fewest bits, at least its
            own, that keep enough of its update. ``lossless`` multiplies the magnitude
            into the scales, and writes the low-rank part as a LoRA adapter.
            ``dequantize`` makes the whole model dense.
        keep: Least share of each layer's update to keep, and least cosine with it,
            after packing. With 0, the base's bits are always kept.
        scales: Dtype of the scales after a lossless fuse.
    """

    mode: Literal["requantize", "lossless", "dequantize"] = field(
        default="requantize",
        metadata={
            "help": "How to fuse a quantized base: repack each adapted layer with the "
            "bits that --keep needs; or multiply the magnitudes into the scales and "
            "write the low-rank part as a LoRA adapter to OUT/adapter; or make the "
            "whole model dense."
        },
    )
    keep: float = field(
        default=0.9,
        metadata={
            "help": "Share of each layer's update that packing must keep; 0 always "
            "keeps the base's bits."
        },
    )
    scales: Literal["float32", "float16"] = field(
        default="float32",
        metadata={"help": "Dtype of the scales that hold the magnitudes (lossless)."},
    )

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            DoRAError: If a setting has a value that is not allowed.
        """
        for name, known in (("mode", _MODES), ("scales", _SCALES)):
            value = getattr(self, name)
            if value not in known:
                raise DoRAError(f"{name} must be {', '.join(known)}; got {value!r}.")
        is_number = isinstance(self.keep, int | float)
        if not is_number or not 0 <= self.keep < 1:
            raise DoRAError(f"keep must be at least 0 and below 1, got {self.keep!r}.")
