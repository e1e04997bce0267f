"""Calculate the least time of each kernel on Apple chips; nothing is measured.

    python benchmarks/kernel_floors.py

Prints the table of metal/README.md. A floor is the larger of two times: bytes over
memory bandwidth, and float32 operations over the peak of the arithmetic units. The case
is bfloat16 with 4096 x 4096 weights and 2048 tokens. Rereads of A, B and h are assumed
to hit a cache.
"""

from dataclasses import dataclass

import mlx.core as mx

from mlx_dora.doctor import traffic


@dataclass(frozen=True)
class Chip:
    """A chip: published bandwidth, and cores x 128 units x 2 x clock."""

    name: str
    gbps: float
    tflops: float


CHIPS = (
    Chip("M1", 68, 2.6),
    Chip("M1 Max", 400, 10.4),
    Chip("M4 Max", 546, 18.4),
    Chip("M2 Ultra", 800, 27.2),
    Chip("M3 Ultra", 819, 28.7),
)
SHAPE = (4096, 4096)
ACTIVATIONS = (2048, 4096)
HALF = mx.bfloat16
CORES = 32  # the sums of a launch grow with the cores, by less than 1 % of the bytes


def rows() -> list[tuple[str, int, int]]:
    """Return name, bytes and float32 operations of each kernel."""
    weight = SHAPE[0] * SHAPE[1]
    outputs = ACTIVATIONS[0] * ACTIVATIONS[1]
    table = [
        (
            "normalize_rows",
            traffic.normalize_rows_traffic(SHAPE, HALF).large,
            3 * weight,
        )
    ]
    for r in (8, 64):
        dense = traffic.adapted_norm_traffic(SHAPE, r, HALF, cores=CORES)
        packed = traffic.adapted_norm_packed_traffic(
            SHAPE, r, 4, 64, HALF, cores=CORES
        )
        fused = traffic.fused_weight_traffic(SHAPE, r, HALF, cores=CORES)
        scale = traffic.dora_scale_traffic(ACTIVATIONS, r, HALF, cores=CORES)
        table += [
            (f"adapted_norm, r {r}", dense.large, (2 * r + 8) * weight),
            (f"adapted_norm 4-bit, r {r}", packed.large, (2 * r + 14) * weight),
            (f"fused_weight, r {r}", fused.large, (2 * r + 5) * weight),
            (f"dora_scale, r {r}", scale.large, (2 * r + 2) * outputs),
        ]
    backward = traffic.dora_scale_backward_traffic(
        ACTIVATIONS, HALF, False, cores=CORES
    )
    table.append(("dora_scale backward", backward.large, 4 * outputs))
    return table


def main() -> None:
    print(f"| kernel | MB | {' | '.join(chip.name for chip in CHIPS)} |")
    print(f"| --- | ---: |{' ---: |' * len(CHIPS)}")
    for name, moved, operations in rows():
        cells = []
        for chip in CHIPS:
            memory, arithmetic = (
                moved / chip.gbps / 1e9,
                operations / chip.tflops / 1e12,
            )
            mark = "" if memory >= arithmetic else "*"
            cells.append(f"{max(memory, arithmetic) * 1e6:.0f}{mark}")
        print(f"| {name} | {moved / 1e6:.1f} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
