"""What a fuse does with packed weights.

Imports no MLX, so that the command line can make its options from the fields.
"""

from dataclasses import dataclass, field
from typing import Literal

from mlx_dora.errors import DoRAError

_MODES = ("requantize", "lossless", "dequantize")
_SCALES = ("float32", "float16")


@dataclass(frozen=True, kw_only=True)
class FuseConfig:
    """What becomes of the layers of a quantised base.

    Attributes:
        mode: ``requantize`` packs an adapted layer again with the fewest bits, from its
            own upwards, that keep enough of its update. ``lossless`` multiplies the
            magnitude into the scales and leaves the low-rank rest as a LoRA adapter.
            ``dequantize`` makes the whole model dense.
        keep: Least share of each layer's update, and cosine with it, after packing; 0
            keeps the base's bits, whatever is lost.
        scales: Dtype of the scales that take the magnitudes.
    """

    mode: Literal["requantize", "lossless", "dequantize"] = field(
        default="requantize",
        metadata={
            "help": "What becomes of an adapted layer of a quantised base: packed "
            "again with as many bits as --keep needs; or its magnitude into its "
            "scales, with the low-rank rest as a LoRA adapter in OUT/adapter; or the "
            "whole model dense."
        },
    )
    keep: float = field(
        default=0.9,
        metadata={
            "help": "Share of each layer's update that packing must keep; 0 keeps the "
            "base's bits, whatever is lost."
        },
    )
    scales: Literal["float32", "float16"] = field(
        default="float32",
        metadata={"help": "Dtype of the scales that take the magnitudes (lossless)."},
    )

    def __post_init__(self) -> None:
        """Refuse what is not a choice.

        Raises:
            DoRAError: Naming the setting, what is allowed and what came.
        """
        for name, known in (("mode", _MODES), ("scales", _SCALES)):
            value = getattr(self, name)
            if value not in known:
                raise DoRAError(f"{name} must be {', '.join(known)}; got {value!r}.")
        is_number = isinstance(self.keep, int | float)
        if not is_number or not 0 <= self.keep < 1:
            raise DoRAError(f"keep must be at least 0 and below 1, got {self.keep!r}.")
