"""Calculate the least time of each kernel on Apple chips; nothing is measured.

    python benchmarks/kernel_floors.py

Prints the tables of metal/README.md. A floor is the larger of two times: bytes over
memory bandwidth, and float32 operations over the peak of the arithmetic units. The case
is bfloat16 with 4096 x 4096 weights and 2048 tokens. Rereads of A, B and h are assumed
to hit a cache. The second table is the largest rank at which the bytes take longer than
the operations; above it, a matrix product on matrix units is the right tool.
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
# NVIDIA's published float32 rate without tensor cores, which the kernels do not use.
GPU = Chip("H200", 4800, 67)
SHAPE = (4096, 4096)
ACTIVATIONS = (2048, 4096)
HALF = mx.bfloat16
CORES = 32  # the sums of a launch grow with the cores, by less than 1 % of the bytes


def at_rank(r: int) -> list[tuple[str, int, int]]:
    """Return name, bytes and float32 operations of each kernel with a product."""
    weight = SHAPE[0] * SHAPE[1]
    outputs = ACTIVATIONS[0] * ACTIVATIONS[1]
    dense = traffic.adapted_norm_traffic(SHAPE, r, HALF, cores=CORES)
    packed = traffic.adapted_norm_packed_traffic(SHAPE, r, 4, 64, HALF, cores=CORES)
    fused = traffic.fused_weight_traffic(SHAPE, r, HALF, cores=CORES)
    scale = traffic.dora_scale_traffic(ACTIVATIONS, r, HALF, cores=CORES)
    return [
        ("adapted_norm", dense.large, (2 * r + 7) * weight),
        ("adapted_norm 4-bit", packed.large, (2 * r + 13) * weight),
        ("fused_weight", fused.large, (2 * r + 3) * weight),
        ("dora_scale", scale.large, (2 * r + 2) * outputs),
    ]


def rows() -> list[tuple[str, int, int]]:
    """Return name, bytes and float32 operations of each kernel."""
    weight = SHAPE[0] * SHAPE[1]
    outputs = ACTIVATIONS[0] * ACTIVATIONS[1]
    moved = traffic.normalize_rows_traffic(SHAPE, HALF).large
    table = [("normalize_rows", moved, 3 * weight)]
    for r in (8, 64):
        table += [(f"{name}, r {r}", size, count) for name, size, count in at_rank(r)]
    backward = traffic.dora_scale_backward_traffic(
        ACTIVATIONS, HALF, False, cores=CORES
    )
    table.append(("dora_scale backward", backward.large, 4 * outputs))
    return table


def largest_rank(chip: Chip, index: int) -> int:
    """Return the largest rank at which memory is slower than arithmetic, or 0."""
    last = 0
    for r in range(1, 513):
        _, moved, operations = at_rank(r)[index]
        if moved / chip.gbps / 1e9 < operations / chip.tflops / 1e12:
            break
        last = r
    return last


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
    chips = (*CHIPS, GPU)
    print(f"\n| kernel | {' | '.join(chip.name for chip in chips)} |")
    print(f"| --- |{' ---: |' * len(chips)}")
    for index, (name, _, _) in enumerate(at_rank(8)):
        ranks = [str(largest_rank(chip, index)) for chip in chips]
        print(f"| {name} | {' | '.join(ranks)} |")


if __name__ == "__main__":
    main()
