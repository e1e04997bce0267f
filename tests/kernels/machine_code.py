"""Machine code of sm_90 kernels: registers, local memory, and widths of accesses.

Reads the cubin (ELF) of NVRTC or nvcc, without a disassembler. An instruction has 16
bytes: its lowest 12 bits are the opcode, and bits 73 to 75 of an access its width. Both
were compared with `nvdisasm` for all kernels.
"""

import re
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_OPCODES = {
    0x981: "LDG",  # device memory
    0x986: "STG",
    0x984: "LDS",  # memory of the threadgroup
    0x988: "STS",
    0x388: "STS",
    0x983: "LDL",  # registers spilled to memory
    0x387: "STL",
    0x987: "STL",
    0xB1D: "BAR",
    0xF89: "SHFL",
}
_WIDTHS = (1, 1, 2, 2, 4, 8, 16, 16)  # bytes
_RESERVED = 1024  # bytes of threadgroup memory that CUDA itself takes
_MEMORY = ("LDG", "STG", "LDS", "STS", "LDL", "STL")


@dataclass(frozen=True)
class MachineCode:
    """One kernel.

    Attributes:
        registers: Registers of a thread.
        shared: Bytes of threadgroup memory, with 1 KiB that CUDA takes.
        counts: Number of instructions, by name and, for memory, bytes of a thread.
    """

    registers: int
    shared: int
    counts: Counter[str]

    def widest(self, name: str) -> int:
        """Return the bytes of the widest access of this name, 0 if there is none."""
        widths = [int(key.split(".")[1]) for key in self.counts if key.startswith(name)]
        return max(widths, default=0)

    @property
    def spills(self) -> int:
        """Accesses to registers that were spilled to memory."""
        return sum(n for key, n in self.counts.items() if key[:3] in ("LDL", "STL"))


def read_cubin(path: Path) -> dict[str, MachineCode]:
    """Return the kernels of a cubin by their names in the source."""
    data = path.read_bytes()
    (table,) = struct.unpack_from("<Q", data, 40)
    size, count, names = struct.unpack_from("<HHH", data, 58)
    headers = [
        struct.unpack_from("<IIQQQQIIQQ", data, table + i * size) for i in range(count)
    ]
    sections: dict[str, bytes] = {}
    sizes: dict[str, int] = {}
    places: dict[int, str] = {}
    for index, (name, _, _, _, offset, length, *_) in enumerate(headers):
        at = headers[names][4] + name
        title = data[at : data.index(b"\0", at)].decode()
        places[index] = title
        sections[title] = data[offset : offset + length]
        sizes[title] = length  # threadgroup memory has no bytes in the file
    symbols = {
        number: places.get(section, "")
        for number, (_, _, _, section, _, _) in enumerate(
            struct.iter_unpack("<IBBHQQ", sections[".symtab"])
        )
    }
    registers = {
        symbols[number]: registers
        for number, registers in _register_counts(sections[".nv.info"])
    }
    return {
        _source_name(title): MachineCode(
            registers=registers[title],
            shared=sizes.get(title.replace(".text.", ".nv.shared.", 1), _RESERVED),
            counts=_instructions(code),
        )
        for title, code in sections.items()
        if title.startswith(".text.")
    }


def _register_counts(info: bytes) -> Iterator[tuple[int, int]]:
    """Yield the number of a symbol and its registers."""
    at = 0
    while at < len(info):
        form, attribute, size = struct.unpack_from("<BBH", info, at)
        at += 4
        if form != 4:  # the value stands in place of the size
            continue
        if attribute == 0x2F:
            yield struct.unpack_from("<II", info, at)
        at += size


def _instructions(code: bytes) -> Counter[str]:
    counts: Counter[str] = Counter()
    for low, high in struct.iter_unpack("<QQ", code):
        name = _OPCODES.get(low & 0xFFF)
        if name in _MEMORY:
            counts[f"{name}.{_WIDTHS[high >> 9 & 7]}"] += 1
        elif name:
            counts[name] += 1
    return counts


def _source_name(symbol: str) -> str:
    found = re.search(r"\d(kernel_\d+?)(?=\D*P|E|$)", symbol)
    assert found, symbol
    return found[1]


def resident_threadgroups(code: MachineCode, threads: int) -> int:
    """Return how many threadgroups a multiprocessor of sm_90 holds at once.

    By its published limits: 65,536 registers, given to a simdgroup in units of 256; 64
    simdgroups; 32 threadgroups; 228 KiB of threadgroup memory.
    """
    simdgroups = -(-threads // 32)
    registers = -(-code.registers * 32 // 256) * 256
    by_registers = 65_536 // registers // simdgroups
    by_memory = 228 * 1024 // code.shared
    return min(by_registers, 64 // simdgroups, 32, by_memory)
