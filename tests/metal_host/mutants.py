"""Running the proof on sources with one bug planted in them."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

from mlx_dora.kernels import dispatch
from mlx_dora.kernels._source import read_source
from tests.metal_host.cases import Case, worst_error
from tests.metal_host.execute import HEAP, MISALIGN
from tests.metal_host.host import Host, call


@dataclass(frozen=True)
class Mutant:
    """One bug in one file.

    Attributes:
        name: What is wrong.
        file: The source it is planted in.
        old: Text that is there, `count` times.
        new: What takes its place.
        kernel: The kernel whose cases should show it.
        cases: Text in the names of the cases to run; empty for the kernel's usual ones.
        is_refused_by_the_compiler: Whether already g++ sees it, with the shim's types.
        is_wide: Whether it is in the text with accesses of 16 bytes, which CUDA gets.
    """

    name: str
    file: str
    old: str
    new: str
    kernel: str
    cases: str = ""
    is_refused_by_the_compiler: bool = False
    is_wide: bool = False

    def apply(self, text: str) -> str:
        """The source with the bug in it."""
        assert self.old in text, f"{self.name}: no longer in {self.file}: {self.old!r}"
        return text.replace(self.old, self.new)


@contextmanager
def edited(file: str, edit: Callable[[str], str]) -> Iterator[None]:
    """The library reads this source as `edit` makes it."""

    def read(name: str) -> str:
        text = read_source(name)
        return edit(text) if name == file else text

    with mock.patch.object(dispatch, "read_source", read):
        yield


# Cheap cases that between them take every path of a kernel.
USUAL_CASES = {
    "normalize_rows": r"float16-(5x3|9x31|3x33|4x1000|2x2300|2x9000|1x16400)$",
    "adapted_norm": (
        r"float16-(9x31-r8|3x33-r1|10x70-r17|5x300-r16|9x40-r512|3x257-r8|3x1000-r8"
        r"|141x300-r(8|17)|290x130-r33|530x40-r3)$"
    ),
    "adapted_norm_packed": (
        r"float32-9x(320|384)-.*|float16-9x64-|bfloat16-9x128-r(17|512)-"
        r"|float16-141x320"
    ),
    "fused_weight": (
        r"float16-(3x33-r1|9x31-r8|33x1000-r1|17x300-r8|9x4100-r8|9x70-r17|5x16400-r3)$"
    ),
    "dora_scale": (
        r"float16-(3x31-r8|17x33-r8(-offset)?|19x33-r(64|512)|[12]x1200-r8)$"
    ),
    "dora_scale_backward": r"float16-(1x1|3x31|20x12|130x133|150x400)(-offset)?$",
}
USUAL_CASES["adapted_norm_total"] = USUAL_CASES["adapted_norm"]
USUAL_CASES["dora_scale_columns"] = USUAL_CASES["dora_scale_backward"]

# A few of them, which show most bugs: to be tried before the others are compiled.
FIRST_CASES = {
    "normalize_rows": r"float16-(5x3|9x31)$",
    "adapted_norm": r"float16-(9x31-r8|10x70-r17|141x300-r8)$",
    "adapted_norm_packed": r"float32-9x(320-r8-[235]bit|384-r8-8bit)",
    "fused_weight": r"float16-(3x33-r1|9x31-r8)$",
    "dora_scale": r"float16-(3x31-r8|17x33-r8(-offset)?)$",
    "dora_scale_backward": r"float16-(3x31|20x12)(-offset)?$",
    "dora_scale_columns": r"float16-(3x31|130x133)(-offset)?$",
}
FIRST_CASES["adapted_norm_total"] = FIRST_CASES["adapted_norm"]


def cases_of(kernel: str, grid: list[Case], pattern: str = "") -> list[Case]:
    """The cases that examine mutants of a kernel."""
    name = kernel.replace("_columns", "_backward").replace("_total", "")
    wanted = re.compile(rf"^{name}-.*(?:{pattern or USUAL_CASES[kernel]})")
    return [case for case in grid if wanted.match(case.name)]


Examinations = tuple[tuple[str, dict[str, int]], ...]
# How the cases are run, until one shows the bug: first the exact checker, then the
# compiler's sanitizers with buffers off their natural alignment.
EXAMINATIONS: Examinations = (
    ("check", {}),
    ("sanitize", {"flags": HEAP | MISALIGN}),
)
WIDE_EXAMINATIONS: Examinations = (
    ("check-wide", {}),
    ("check-wide", {"flags": MISALIGN}),
    ("sanitize-wide", {"flags": HEAP | MISALIGN}),
)


def examine(
    host: Host, cases: list[Case], examinations: Examinations = EXAMINATIONS
) -> str:
    """How the cases show a bug in the sources as they are now; empty if they do not."""
    for mode, options in examinations:
        with host.running(mode, **options):
            for case in cases:
                try:
                    results = case.run(call)
                except AssertionError as problem:
                    return f"does not compile: {str(problem)[:200]}"
                if host.findings:
                    kinds = ", ".join(host.findings)
                    return f"{kinds} ({case.name})"
                for output, truth, bound in results:
                    error = worst_error(output, truth)
                    if not error <= bound:
                        return f"wrong by {error:.1e} ({case.name})"
    return ""
