"""Compiling kernel text with g++ into programs that run it; cached by content."""

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx

from tests.metal_host.records import Record
from tests.metal_host.translate import unit

HERE = Path(__file__).parent
# A Mac's g++ is clang, and it has Metal itself.
COMPILER = shutil.which("g++") if sys.platform == "linux" else None
# The preamble of every Metal kernel is in MLX's wheel; the folder of the compiled core.
_MLX_HEADERS = Path(mx.__file__).parent / "include"

_FLAGS = "-std=gnu++17 -g1 -no-pie -ffp-contract=off -fno-exceptions -fno-rtti -w"
# A local variable read before it is written holds a huge number, or NaN in half.
_POISON = "-ftrivial-auto-var-init=pattern"
_COMMON = [*_FLAGS.split(), _POISON]
if platform.machine() == "x86_64":
    _COMMON += ["-mf16c", "-mfma"]


@dataclass(frozen=True)
class Mode:
    """How a program is compiled, and which accesses it judges."""

    kernel: str
    runtime: str
    link: str
    sources: tuple[str, ...]
    is_wide: bool = False


_WIDE_FLAGS = "-fno-strict-aliasing"
_PLAIN = ("main.cpp", "executor.cpp", "no_checker.cpp")
_CHECKING = Mode(
    "-O1 -fno-tree-vectorize -fsanitize=thread",
    "-O2",
    "",
    ("main.cpp", "executor.cpp", "checker.cpp"),
)
_SANITIZING = Mode(
    # Optimizing would double the compiler's time, and may remove a wrong access.
    "-O0 -fsanitize=address,undefined -fno-sanitize-recover=undefined",
    "-O1 -fsanitize=address",
    "-fsanitize=address,undefined",
    _PLAIN,
)


def _wide(mode: Mode) -> Mode:
    """The same, with the accesses of 16 bytes that CUDA gets."""
    flags = f"{mode.kernel} {_WIDE_FLAGS}"
    return Mode(flags, mode.runtime, mode.link, mode.sources, is_wide=True)


MODES = {
    "plain": Mode("-O2", "-O2", "", _PLAIN),
    "check": _CHECKING,
    "sanitize": _SANITIZING,
    "check-wide": _wide(_CHECKING),
    "sanitize-wide": _wide(_SANITIZING),
}


def _compile(arguments: Iterable[str | Path]) -> str | None:
    """Run the compiler; its complaint, or None."""
    command = [str(COMPILER), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else done.stderr


@dataclass
class Builder:
    """Programs by kernel and mode, in a cache folder.

    Attributes:
        folder: Where programs are kept; names are hashes of content.
        programs: Program of each (mode, kernel key) built so far.
        refused: The compiler's complaint about each (mode, kernel key) it refused.
    """

    folder: Path
    per_unit: int = 24
    programs: dict[tuple[str, str], Path] = field(default_factory=dict)
    refused: dict[tuple[str, str], str] = field(default_factory=dict)

    _includes = ("-I", HERE / "shim", "-I", _MLX_HEADERS)

    def build(self, records: Iterable[Record], mode: str) -> None:
        """Make a program for every record that has none in this mode yet."""
        texts = {r.key: r for r in records if not self._has(mode, r.key)}
        wanted = sorted(texts.values(), key=lambda r: (r.name, r.key))
        chunks = [
            wanted[i : i + self.per_unit] for i in range(0, len(wanted), self.per_unit)
        ]
        self.folder.mkdir(parents=True, exist_ok=True)
        if chunks:
            self._runtime(mode)
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            list(pool.map(lambda chunk: self._build_unit(chunk, mode), chunks))

    def _has(self, mode: str, key: str) -> bool:
        return (mode, key) in self.programs or (mode, key) in self.refused

    def _build_unit(self, records: list[Record], mode: str) -> None:
        while records:
            program, complaint = self._program(
                unit(records, is_wide=MODES[mode].is_wide), mode
            )
            if complaint is None:
                for record in records:
                    self.programs[mode, record.key] = program
                return
            # The compiler names the kernels that it refuses; go on without them.
            bad = set(re.findall(r"\b(k[0-9a-f]{16})\b", complaint))
            bad &= {r.key for r in records}
            assert bad, complaint[:4000]
            for key in bad:
                self.refused[mode, key] = complaint
            records = [r for r in records if r.key not in bad]

    def _program(self, source: str, mode: str) -> tuple[Path, str | None]:
        how = MODES[mode]
        name = f"{mode}-{_digest(source, how.kernel, *self._parts(mode))}"
        program = self.folder / name
        refusal = self.folder / f"{name}.refused"
        if program.exists():
            return program, None
        if refusal.exists():
            return program, refusal.read_text()
        cpp = self.folder / f"{name}.cpp"
        cpp.write_text(source)
        made = self.folder / f"{name}.{os.getpid()}"
        flags = [*_COMMON, *how.kernel.split(), *self._includes]
        complaint = _compile([*flags, "-c", cpp, "-o", f"{made}.o"])
        if complaint is not None:
            refusal.write_text(complaint)
            return program, complaint
        objects = [f"{made}.o", *self._runtime(mode)]
        complaint = _compile(["-no-pie", *objects, *how.link.split(), "-o", made])
        assert complaint is None, complaint
        Path(f"{made}.o").unlink()
        made.replace(program)
        return program, None

    def assembly(self, records: Iterable[Record], *, is_wide: bool = False) -> str:
        """The optimised machine code of these kernels, without their names."""
        cpp = self.folder / f"assembly.{os.getpid()}.cpp"
        cpp.write_text(unit(records, is_wide=is_wide))
        wide = _WIDE_FLAGS.split() if is_wide else []
        command = [COMPILER, *_COMMON, "-O2", "-g0", *wide, *self._includes]
        done = subprocess.run(
            [*map(str, command), "-S", "-o", "-", str(cpp)],
            capture_output=True,
            text=True,
            check=True,
        )
        return re.sub(r"k[0-9a-f]{16}", "kernel", done.stdout)

    def _parts(self, mode: str) -> list[str]:
        """All that a program of this mode is made of besides its kernels."""
        files = [*sorted((HERE / "shim").rglob("*")), *_runtime_sources(mode)]
        texts = [p.read_text() for p in files if p.is_file()]
        return [MODES[mode].runtime, MODES[mode].link, *_COMMON, *texts]

    def _runtime(self, mode: str) -> list[Path]:
        digest = _digest(*self._parts(mode))
        objects = []
        for source in MODES[mode].sources:
            made = self.folder / f"{mode}-{digest}-{source}.o"
            objects.append(made)
            if made.exists():
                continue
            aside = made.with_suffix(f".{os.getpid()}")
            flags = [*_COMMON, *MODES[mode].runtime.split()]
            complaint = _compile([*flags, "-c", HERE / "runtime" / source, "-o", aside])
            assert complaint is None, complaint
            aside.replace(made)
        return objects


def _runtime_sources(mode: str) -> list[Path]:
    headers = sorted((HERE / "runtime").glob("*.h"))
    return headers + [HERE / "runtime" / s for s in MODES[mode].sources]


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]
