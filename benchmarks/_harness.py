"""Shared code of all benchmarks. Import it before mlx, because it loads OpenBLAS.

A case is one job (one layer, one shape) that several contenders do in one process. The
harness first checks each contender against its reference and stops the run if they
differ. Then it warms up all contenders and times them in turns. The order rotates from
round to round, so that a slow minute of the machine affects all of them. Peak memory is
measured in a separate round. Each case prints one JSON line to stdout and a table to
stderr::

    import _harness as bench        # before mlx
    import mlx.core as mx

    @click.command()
    @bench.options
    def main(settings: bench.Settings) -> None:
        case = bench.Case(
            name="q_proj decode",
            dtype="float32",
            contenders=[
                bench.Contender(name="lora", run=lambda: lora(x)),
                bench.Contender(name="ours", run=lambda: ours(x), expected=dense),
            ],
            baseline="lora",                 # ratios are relative to this contender
            facts={"rank": 8, "tokens": 1},  # anything that describes the case
        )
        bench.report(bench.measure(case, settings))
"""

from mlx_dora import openblas  # isort: skip - loads OpenBLAS, so before mlx

import gc
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import mlx.core as mx
import numpy as np
from _machine import describe_machine
from mlx.utils import tree_flatten

BLAS = openblas.preload()
Arrays = Any  # an array or a tree of arrays: what `mx.eval` accepts


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How often to run, and where to write the lines besides stdout."""

    warmups: int = 5
    runs: int = 30
    smoke: bool = False
    json_file: Path | None = None
    clock: str = "wall"

    def now(self) -> float:
        """Return the seconds of the clock: wall time, or CPU time of all threads."""
        return time.process_time() if self.clock == "cpu" else time.perf_counter()


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A way of doing the job.

    ``run`` returns the arrays to evaluate. ``expected`` computes the right answer
    independently; None means that there is nothing to compare with, as for the base.
    The relative RMS difference may be at most ``bound``.
    """

    name: str
    run: Callable[[], Arrays]
    expected: Callable[[], Arrays] | None = None
    bound: float = 1e-4


@dataclass(frozen=True, kw_only=True)
class Case:
    """A job and its contenders; ratios are relative to ``baseline``."""

    name: str
    dtype: str
    contenders: Sequence[Contender]
    baseline: str
    facts: dict[str, str | int | float | bool] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Milliseconds and bytes of a contender."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    peak_bytes: int
    transient_bytes: int  # peak minus the bytes alive before the run
    error: float | None  # relative RMS against the reference


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """The figures of a case, in the order of its contenders."""

    case: Case
    settings: Settings
    timings: dict[str, Timing]

    def time_ratio(self, name: str) -> float:
        """Return a contender's median time divided by the baseline's."""
        return self.timings[name].median_ms / self.timings[self.case.baseline].median_ms

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON line as a dictionary."""
        return {
            "case": self.case.name,
            "dtype": self.case.dtype,
            **self.case.facts,
            "baseline": self.case.baseline,
            "time_ratio": {n: round(self.time_ratio(n), 4) for n in self.timings},
            "contenders": {n: vars(t) for n, t in self.timings.items()},
            "warmups": self.settings.warmups,
            "runs": self.settings.runs,
            "clock": self.settings.clock,
            "smoke": self.settings.smoke,
            "blas": BLAS.state,
            **describe_machine(),
        }


def options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the flags of every benchmark; the command gets them as ``settings``."""

    def wrapped(
        smoke: bool,
        runs: int | None,
        warmups: int | None,
        json_file: Path | None,
        clock: str,
        **others: Any,
    ) -> None:
        settings = Settings(
            warmups=warmups if warmups is not None else (1 if smoke else 5),
            runs=runs if runs is not None else (3 if smoke else 30),
            smoke=smoke,
            json_file=json_file,
            clock=clock,
        )
        command(settings=settings, **others)

    wrapped.__doc__ = command.__doc__
    wrapped.__name__ = command.__name__
    wrapped.__dict__.update(command.__dict__)  # click stores its parameters there
    for option in (
        click.option("--json", "json_file", type=click.Path(path_type=Path),
                     help="Also append the JSON lines to this file."),
        click.option("--clock", type=click.Choice(["wall", "cpu"]), default="wall",
                     show_default=True,
                     help="cpu: CPU time, for a machine with other jobs; set "
                     "OPENBLAS_NUM_THREADS=1, since waiting threads count too."),
        click.option("--warmups", type=click.IntRange(min=0),
                     help="Untimed rounds before the timed ones (5; 1 with --smoke)."),
        click.option("--runs", type=click.IntRange(min=1),
                     help="Timed rounds (30; 3 with --smoke)."),
        click.option("--smoke", is_flag=True,
                     help="Tiny sizes: show that it runs, not how fast."),
    ):  # fmt: skip
        wrapped = option(wrapped)
    return wrapped


def measure(case: Case, settings: Settings) -> Measurement:
    """Check, warm up, time in turns, then measure peak memory."""
    errors = {c.name: _check(case, c) for c in case.contenders}
    for _ in range(settings.warmups):
        for contender in case.contenders:
            mx.eval(contender.run())
    times: dict[str, list[float]] = {c.name: [] for c in case.contenders}
    for turn in range(settings.runs):
        first = turn % len(case.contenders)
        for contender in (*case.contenders[first:], *case.contenders[:first]):
            mx.synchronize()
            start = settings.now()
            mx.eval(contender.run())
            mx.synchronize()
            times[contender.name].append((settings.now() - start) * 1e3)
    timings = {}
    for contender in case.contenders:
        peak, transient = _memory(contender)
        p20, median, p80 = np.percentile(times[contender.name], [20, 50, 80])
        timings[contender.name] = Timing(
            median_ms=round(float(median), 4),
            p20_ms=round(float(p20), 4),
            p80_ms=round(float(p80), 4),
            peak_bytes=peak,
            transient_bytes=transient,
            error=errors[contender.name],
        )
    return Measurement(case=case, settings=settings, timings=timings)


def report(measurement: Measurement) -> None:
    """Print a JSON line to stdout (and ``--json``) and a table to stderr."""
    line = json.dumps(measurement.to_dict())
    click.echo(line)
    if measurement.settings.json_file:
        with measurement.settings.json_file.open("a") as file:
            file.write(line + "\n")
    click.echo(_table(measurement), err=True)


@contextmanager
def norms_where(ride: Callable[[Any, mx.array], bool]) -> Iterator[None]:
    """Decide by `ride` in place of `riding.rides` where W0·A rides with W0·x."""
    from mlx_dora.layers import linear

    decide = linear.rides
    linear.rides = ride
    try:
        yield
    finally:
        linear.rides = decide


def never(base: Any, x: mx.array) -> bool:
    """Decide for `norms_where` that W0·A is computed apart from W0·x everywhere."""
    return False


def relative_rms(actual: Arrays, expected: Arrays) -> float:
    """Return the worst ‖actual - expected‖ / ‖expected‖ over two trees of arrays."""
    got, want = (
        {
            name: np.array(value.astype(mx.float32), np.float64)
            for name, value in tree_flatten([tree])
            if isinstance(value, mx.array)
        }
        for tree in (actual, expected)
    )
    if got.keys() != want.keys():
        raise click.ClickException(f"results differ: {sorted(got)} and {sorted(want)}")
    worst = 0.0
    for name, value in want.items():
        size = float(np.linalg.norm(value)) or 1.0
        worst = max(worst, float(np.linalg.norm(got[name] - value)) / size)
    return worst


def _check(case: Case, contender: Contender) -> float | None:
    if contender.expected is None:
        return None
    error = relative_rms(contender.run(), contender.expected())
    if not error <= contender.bound:  # NaN fails too
        raise click.ClickException(
            f"{case.name}: {contender.name} is {error:.2e} off its reference, "
            f"more than {contender.bound:.0e}; nothing was timed."
        )
    return error


def _memory(contender: Contender) -> tuple[int, int]:
    """Return the peak bytes of a run, in total and above what was alive before it."""
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(contender.run())
    peak = mx.get_peak_memory()
    return peak, max(peak - before, 0)


def _table(measurement: Measurement) -> str:
    case = measurement.case
    facts = ", ".join(f"{k} {v}" for k, v in case.facts.items())
    title = f"{case.name} ({case.dtype}{', ' + facts if facts else ''})"
    head = f"  {'':24}{'median ms':>11}{'p20':>10}{'p80':>10}{'time':>9}{'extra':>16}"
    rows = [
        f"  {name:24}{t.median_ms:11.3f}{t.p20_ms:10.3f}{t.p80_ms:10.3f}"
        f"{measurement.time_ratio(name):8.2f}x{t.transient_bytes / 2**20:12.1f} MiB"
        for name, t in measurement.timings.items()
    ]
    return "\n".join(
        [
            title,
            head,
            *rows,
            f"  time: over {case.baseline}'s; extra: peak above memory in use before",
        ]
    )
