"""Zero the machine code of all GPUs but one architecture in MLX's CUDA library.

    python benchmarks/gpu/shrink_cuda.py libmlx.so OUT.so [--arch 90]

The wheel's library holds seven architectures. What is zeroed compresses to nothing, so
that 145 MB become 16 MB of xz. The headers of the images stay, and the driver takes the
image of its own architecture.
"""

import argparse
import struct
from pathlib import Path

_MAGIC = b"\x50\xed\x55\xba"  # of a fat binary
_ARCHITECTURE = 28  # offset in the header of an image


def shrink(data: bytearray, arch: int) -> int:
    """Zero the images of other architectures in place, and return their bytes."""
    zeroed, place = 0, data.find(_MAGIC)
    while place != -1:
        _, _, header, size = struct.unpack_from("<IHHQ", data, place)
        entry, end = place + header, place + header + size
        if header != 16 or end > len(data):  # the same bytes by chance
            place = data.find(_MAGIC, place + 4)
            continue
        while entry < end:
            _, _, head, length = struct.unpack_from("<HHIQ", data, entry)
            if struct.unpack_from("<I", data, entry + _ARCHITECTURE)[0] != arch:
                data[entry + head : entry + head + length] = bytes(length)
                zeroed += length
            entry += head + length
        place = data.find(_MAGIC, end)
    return zeroed


def main() -> None:
    """Shrink a file, and say by how much."""
    parser = argparse.ArgumentParser(description="One architecture of MLX's library")
    parser.add_argument("library", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--arch", type=int, default=90)
    options = parser.parse_args()
    data = bytearray(options.library.read_bytes())
    zeroed = shrink(data, options.arch)
    options.output.write_bytes(data)
    print(f"{zeroed / 1e6:.0f} MB zeroed")


if __name__ == "__main__":
    main()
