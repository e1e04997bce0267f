"""The stand-in device: runs the kernels that the library launches, and judges them."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from mlx_dora.kernels import dispatch
from mlx_dora.kernels.plans import KERNELS, Launch
from tests.metal_host.build import Builder
from tests.metal_host.execute import Outcome, execute
from tests.metal_host.records import Dispatch, Record, stand_in


@dataclass
class Host:
    """Runs `mx.fast.metal_kernel` kernels on this machine while `running`.

    Attributes:
        builder: Makes the programs.
        mode: How they are compiled: a key of `build.MODES`.
        options: Keywords of `execute` (seed, flags, groups).
        findings: First finding of each kind since `running` was entered.
        outcomes: Every dispatch since then, with its record.
    """

    builder: Builder
    mode: str = "check"
    options: dict[str, Any] = field(default_factory=dict)
    findings: dict[str, str] = field(default_factory=dict)
    outcomes: list[tuple[Record, Outcome]] = field(default_factory=list)

    @contextmanager
    def running(self, mode: str = "check", **options: Any) -> Iterator["Host"]:
        """Run kernels in this mode, from a clean sheet."""
        self.mode, self.options = mode, options
        self.findings, self.outcomes = {}, []
        with _installed(self._run):
            yield self

    def _run(self, dispatch: Dispatch) -> list[mx.array]:
        record = dispatch.record
        for axis in range(3):
            if record.grid[axis] % record.threadgroup[axis]:
                self.findings["grid"] = (
                    f"grid {record.grid} is no multiple of {record.threadgroup}: CUDA "
                    "would run threads past it"
                )
        threads = record.threadgroup[0] * record.threadgroup[1] * record.threadgroup[2]
        if threads % 32 or threads > 256:
            self.findings["threadgroup"] = (
                f"{threads} threads; some chips take at most 256, in simdgroups of 32"
            )
        self.builder.build([record], self.mode)
        refusal = self.builder.refused.get((self.mode, record.key))
        assert refusal is None, refusal
        program = self.builder.programs[self.mode, record.key]
        outcome = execute(program, dispatch, **self.options)
        self.outcomes.append((record, outcome))
        for kind, text in outcome.findings.items():
            self.findings.setdefault(kind, f"{record.name}: {text}")
        if not outcome.outputs:  # it crashed
            return [mx.full(s, float("nan"), d) for s, d in record.outputs]
        return outcome.outputs


@contextmanager
def _installed(run: Callable[[Dispatch], list[mx.array]]) -> Iterator[None]:
    """The library's kernels are made anew, and run by `run`."""
    real = mx.fast.metal_kernel
    mx.fast.metal_kernel = stand_in(run)
    dispatch.build.cache_clear()
    try:
        yield
    finally:
        mx.fast.metal_kernel = real
        dispatch.build.cache_clear()


def call(name: str, launch: Launch, inputs: list[mx.array]) -> list[mx.array]:
    """Launch a kernel as the library does."""
    return list(dispatch.run(KERNELS[name], inputs, launch))


def launched(calls: Iterable[Callable[[], Any]]) -> list[Record]:
    """What these calls launch, with outputs of zero in place of results."""
    records: list[Record] = []

    def remember(dispatch: Dispatch) -> list[mx.array]:
        records.append(dispatch.record)
        return [mx.zeros(s, dtype=d) for s, d in dispatch.record.outputs]

    with _installed(remember):
        for each in calls:
            each()
    return records
