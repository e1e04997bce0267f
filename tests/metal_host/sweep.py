"""The generic sweep: every barrier, bound, cast and 32 of a kernel, one at a time."""

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from mlx_dora.kernels._source import HEADERS, read_source
from mlx_dora.kernels.plans import KERNELS
from tests.metal_host.build import Builder
from tests.metal_host.cases import Case
from tests.metal_host.execute import HEAP, MISALIGN
from tests.metal_host.host import Host, call, launched
from tests.metal_host.mutants import FIRST_CASES, cases_of, edited, examine
from tests.metal_host.records import Record

_COMPARISON = re.compile(r"(?<=[\w)\]]) (<|<=|>|>=) (?=[\w(])")
_SWAPPED = {"<": "<=", "<=": "<", ">": ">=", ">=": ">"}
_BACK = {"<": "+", ">": "-"}
_RULES = {
    "barrier removed": (re.compile(r"threadgroup_barrier\([^)]*\);"), lambda m: ""),
    "bound shifted": (_COMPARISON, lambda m: f" {_SWAPPED[m[1]]} "),
    "bound shifted back": (_COMPARISON, lambda m: f" {_BACK[m[1][0]]} 1 {m[1]} "),
    "cast removed": (re.compile(r"(?:static_cast<float>|\bfloat)(?=\()"), lambda m: ""),
    "32 halved": (re.compile(r"\b32\b"), lambda m: "16"),
}


@dataclass(frozen=True)
class Edit:
    """One small change of one file; `label` gives line, rule and the line's text."""

    file: str
    start: int
    end: int
    new: str
    label: str
    kernels: tuple[str, ...]  # that use the changed function
    is_wide: bool  # in the text with accesses of 16 bytes, which CUDA gets

    def apply(self, text: str) -> str:
        """The source with the change."""
        return text[: self.start] + self.new + text[self.end :]


def edits(file: str) -> Iterator[Edit]:
    """Every change that the rules make in one source."""
    text = read_source(file)
    for rule, (pattern, replacement) in _RULES.items():
        for found in pattern.finditer(text):
            number = text.count("\n", 0, found.start())
            column = found.start() - text.rfind("\n", 0, found.start())
            line = text.splitlines()[number].strip()
            users = (file.removesuffix(".metal"),)
            if file in HEADERS:
                users = tuple(_users(file, found.start()))
            yield Edit(
                file,
                found.start(),
                found.end(),
                replacement(found),
                f"{file}:{number + 1}:{column}: {rule}: {line}",
                users,
                _is_wide(text[: found.start()]),
            )


def _is_wide(before: str) -> bool:
    """Whether what follows this text is compiled with `DORA_WIDE` alone."""
    last = re.findall(r"^#(?:if DORA_WIDE|else|endif)$", before, re.M)
    return bool(last) and last[-1] == "#if DORA_WIDE"


def _users(file: str, position: int) -> Iterator[str]:
    """The kernels that reach the shared function at this position of a header."""
    texts = [read_source(header) for header in HEADERS]
    position += sum(map(len, texts[: HEADERS.index(file)]))
    shared = "".join(texts)
    functions = list(re.finditer(r"METAL_FUNC \w+ (\w+)\(", shared))
    starts = [*(found.start() for found in functions), len(shared)]
    bodies = [
        (found[1], shared[starts[i] : starts[i + 1]])
        for i, found in enumerate(functions)
    ]
    before = [found[1] for found in functions if found.start() <= position]
    reached = {before[-1] if before else functions[0][1]}
    for _ in functions:  # as deep as calls can nest
        reached |= {n for n, body in bodies if any(r in body for r in reached)}
    for kernel in KERNELS:
        if any(name in read_source(f"{kernel}.metal") for name in reached):
            yield kernel


# On how many of the kernels that use the change it is tried, and how, until it shows;
# 0: on a few cases of the first.
_PHASES = (
    (0, "check", 0),
    (1, "check", 0),
    (len(KERNELS), "check", 0),
    (len(KERNELS), "sanitize", HEAP),  # a thread's own arrays have no other guard
    (1, "check-wide", 0),  # text that both builds have
    (len(KERNELS), "check-wide", 0),
)
_WIDE_PHASES = (
    (0, "check-wide", 0),
    (1, "check-wide", 0),
    (len(KERNELS), "check-wide", 0),
    (len(KERNELS), "check-wide", MISALIGN),
    (len(KERNELS), "sanitize-wide", HEAP),
)


def judge(host: Host, changes: list[Edit], grid: list[Case]) -> dict[str, str]:
    """What becomes of each change, by label; empty where no case shows it.

    What survives and compiles to the same machine code is no change.
    """
    wide = [change for change in changes if change.is_wide]
    if wide and len(wide) < len(changes):
        others = [change for change in changes if not change.is_wide]
        return judge(host, others, grid) | judge(host, wide, grid)
    verdicts = dict.fromkeys((change.label for change in changes), "")
    for reach, mode, flags in _WIDE_PHASES if wide else _PHASES:
        left = [change for change in changes if not verdicts[change.label]]
        records: list[Record] = []
        for change in left:
            records += _records(change, grid, reach)
        host.builder.build(records, mode)
        for change in left:
            with edited(change.file, change.apply):
                verdicts[change.label] = examine(
                    host, _cases(change, grid, reach), ((mode, {"flags": flags}),)
                )
    for change in changes:
        if not verdicts[change.label] and _same_code(host.builder, change, grid):
            verdicts[change.label] = "same machine code"
    return verdicts


def _cases(change: Edit, grid: list[Case], reach: int) -> list[Case]:
    if reach == 0:
        first = change.kernels[0]
        return cases_of(first, grid, FIRST_CASES[first])
    chosen = [c for k in change.kernels[:reach] for c in cases_of(k, grid)]
    return list(dict.fromkeys(chosen))


def _records(change: Edit, grid: list[Case], reach: int) -> list[Record]:
    with edited(change.file, change.apply):
        return _launched(_cases(change, grid, reach))


def _launched(cases: list[Case]) -> list[Record]:
    return launched([partial(case.run, call) for case in cases])


def _same_code(builder: Builder, change: Edit, grid: list[Case]) -> bool:
    before = _launched(_cases(change, grid, len(KERNELS)))
    after = _records(change, grid, len(KERNELS))
    texts = {b.key: (b, a) for b, a in zip(before, after, strict=True)}.values()
    try:
        return builder.assembly(
            [b for b, _ in texts], is_wide=change.is_wide
        ) == builder.assembly([a for _, a in texts], is_wide=change.is_wide)
    except subprocess.CalledProcessError:
        return False
