"""Settings for fusing packed weights."""

from dataclasses import dataclass
from typing import Literal

from mlx_dora.options import check_options, option


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

    mode: Literal["requantize", "lossless", "dequantize"] = option(
        "requantize",
        help="How to fuse a quantized base: repack each adapted layer with the bits "
        "that --keep needs; or multiply the magnitudes into the scales and write the "
        "low-rank part as a LoRA adapter to OUT/adapter; or make the whole model "
        "dense.",
    )
    keep: float = option(
        0.9,
        help="Share of each layer's update that packing must keep; 0 always keeps the "
        "base's bits.",
        least=0,
        below=1,
    )
    scales: Literal["float32", "float16"] = option(
        "float32", help="Dtype of the scales that hold the magnitudes (lossless)."
    )

    def __post_init__(self) -> None:
        check_options(self)
