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
    """

    name: str
    file: str
    old: str
    new: str
    kernel: str
    cases: str = ""
    is_refused_by_the_compiler: bool = False

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
    "normalize_rows": r"float16-(5x3|9x31|3x33|2x2300|2x9000)$",
    "adapted_norm": (
        r"float16-(9x31-r8|3x33-r1|10x70-r17|9x40-r512|3x257-r8|3x1000-r8|2051x40-r3)$"
    ),
    "adapted_norm_packed": (
        r"float32-9x(320|384)-.*|float16-9x64-|bfloat16-9x128-r(17|512)-|float16-2051x64"
    ),
    "fused_weight": r"float16-(9x31-r8|33x1000-r1|9x4100-r8|9x70-r17|3x2300-r8)$",
    "dora_scale": r"float16-(3x31-r8|17x33-r8(-offset)?|19x33-r(64|512)|2x1200-r8)$",
    "dora_scale_backward": r"float16-(1x1|3x31|130x133)(-offset)?$",
}
USUAL_CASES["dora_scale_columns"] = USUAL_CASES["dora_scale_backward"]


def cases_of(kernel: str, grid: list[Case], pattern: str = "") -> list[Case]:
    """The cases that examine mutants of a kernel."""
    name = kernel.replace("_columns", "_backward")
    wanted = re.compile(rf"^{name}-.*(?:{pattern or USUAL_CASES[kernel]})")
    return [case for case in grid if wanted.match(case.name)]


Examinations = tuple[tuple[str, dict[str, int]], ...]
# How the cases are run, until one shows the bug: first the exact checker, then the
# compiler's sanitizers with buffers off their natural alignment.
_EXAMINATIONS: Examinations = (
    ("check", {}),
    ("sanitize", {"flags": HEAP | MISALIGN}),
)


def examine(
    host: Host, cases: list[Case], examinations: Examinations = _EXAMINATIONS
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
