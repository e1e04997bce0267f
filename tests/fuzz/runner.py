"""Starts workers, feeds them case numbers, ends those that take too much."""

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

ROOT = Path(__file__).parents[2]
MAX_SECONDS = 20.0
"""Of processor time for one case, so that a busy machine makes no fault."""
MAX_BYTES = 2 * 10**9
_POLL = 0.05
_USELESS = 3
"""Processes in a row that end before any case, after which a worker gives up."""
_AHEAD = 2
"""Numbers that a worker holds, so that it never waits."""


@dataclass(kw_only=True)
class Outcome:
    """What came of a run.

    Attributes:
        tried: How many cases there were.
        taken: How many inputs were taken in spite of the damage.
        faults: One record a fault: number, kind, command, damage and what was wrong.
    """

    tried: int = 0
    taken: int = 0
    faults: list[dict] = field(default_factory=list)

    def lines(self) -> list[str]:
        """What to print; faults of one cause are one line with a case as example."""
        causes: dict[str, list[dict]] = {}
        for fault in self.faults:
            causes.setdefault(fault["detail"].split(": ")[0], []).append(fault)
        lines = [
            f"{self.tried} inputs: {self.taken} taken, {len(self.faults)} faults of "
            f"{len(causes)} causes."
        ]
        for some in sorted(causes.values(), key=len, reverse=True):
            one = some[0]
            lines.append(
                f"{len(some)} x {one['detail']}\n    e.g. case {one['case']} "
                f"({one['kind']}): {one['what']}\n    {one['damage']}"
            )
        return lines


class Worker:
    """One worker process and its log."""

    def __init__(self, index: int, folder: Path, seed: int) -> None:
        self._scratch = folder / f"scratch-{index}"
        self.command = [
            sys.executable, "-m", "tests.fuzz.worker", str(folder / "material"),
            str(self._scratch), str(seed), str(folder / f"worker-{index}.jsonl"),
        ]  # fmt: skip
        self.log = folder / f"worker-{index}.jsonl"
        self._errors = folder / f"worker-{index}.err"
        self._ended = 0

    def run(self, numbers: "queue.SimpleQueue[int]") -> None:
        """Try cases until there are no more numbers."""
        useless = 0
        while not numbers.empty() and useless < _USELESS:
            ended = self._ended
            _end_line(self.log)
            with self.log.open(encoding="utf-8") as log:
                log.seek(0, os.SEEK_END)
                process = self._start()
                try:
                    self._feed(process, log, numbers)
                finally:
                    process.kill()
                    process.communicate()
            useless = 0 if self._ended > ended else useless + 1

    def _start(self) -> "subprocess.Popen[str]":
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "OPENBLAS_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
        with self._errors.open("w") as errors:
            return subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stderr=errors,
                text=True,
                cwd=ROOT,
                env=environment,
            )

    def _feed(
        self,
        process: "subprocess.Popen[str]",
        log: IO[str],
        numbers: "queue.SimpleQueue[int]",
    ) -> None:
        """Hand out numbers until there are none left or the process is of no more use.

        Numbers that it was given and did not come to are put back.
        """
        assert process.stdin is not None
        pending: list[int] = []
        begun, started = None, 0.0
        while True:
            while len(pending) < _AHEAD and not numbers.empty():
                with contextlib.suppress(queue.Empty, BrokenPipeError):
                    pending.append(numbers.get_nowait())
                    process.stdin.write(f"{pending[-1]}\n")
                    process.stdin.flush()
            for line in _whole_lines(log):
                row = json.loads(line)
                if "begun" in row:
                    begun, started = row, _cpu_seconds(process.pid)
                elif "case" in row:
                    pending.remove(row["case"])
                    begun, self._ended = None, self._ended + 1
            if not pending and numbers.empty():
                return
            problem = self._problem(process, begun, started)
            if problem is not None:
                if begun is not None:
                    self._record(begun, problem)
                    pending.remove(begun["begun"])
                for number in pending:
                    numbers.put(number)
                return
            time.sleep(_POLL)

    def _problem(
        self, process: subprocess.Popen[str], begun: dict | None, started: float
    ) -> str | None:
        code = process.poll()
        if code is not None:
            tail = self._errors.read_text(errors="replace").strip()[-200:]
            return f"the process ended with code {code}: {tail}"
        if begun is None:
            return None
        if _cpu_seconds(process.pid) - started > MAX_SECONDS:
            return f"it took more than {MAX_SECONDS:.0f} s"
        if _resident_bytes(process.pid) > MAX_BYTES:
            return f"it took more than {MAX_BYTES / 1e9:.0f} GB of memory"
        return None

    def _record(self, begun: dict, problem: str) -> None:
        self._ended += 1
        _end_line(self.log)
        row = {key: value for key, value in begun.items() if key != "begun"}
        row |= {"case": begun["begun"], "outcome": "fault", "detail": problem}
        with self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def _end_line(path: Path) -> None:
    """Make the file, or end the line that a killed process left half written."""
    with path.open("a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")


def _whole_lines(file: IO[str]) -> Iterator[str]:
    """The lines since the last call; half a line is left for the next."""
    while True:
        place = file.tell()
        line = file.readline()
        if not line.endswith("\n"):
            file.seek(place)
            return
        yield line


def _cpu_seconds(pid: int) -> float:
    """Processor time of a process; the clock's where the system does not tell."""
    try:
        facts = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return time.monotonic()
    return (int(facts[11]) + int(facts[12])) / os.sysconf("SC_CLK_TCK")


def _resident_bytes(pid: int) -> int:
    """Most memory a process has had; 0 where the system does not tell."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    found = [line.split()[1] for line in text.splitlines() if line.startswith("VmHWM")]
    return int(found[0]) * 1024 if found else 0


def rows(folder: Path) -> Iterator[dict]:
    """What is written down of every case that ended."""
    for log in sorted(folder.glob("worker-*.jsonl")):
        for line in log.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # killed while it wrote
                row = json.loads(line)
                if "case" in row:
                    yield row


def fuzz(folder: Path, numbers: range | list[int], seed: int, workers: int) -> Outcome:
    """Try cases; those that `folder` has the outcome of already are not run again.

    Args:
        folder: For the material, the logs and scratch; made if missing.
        numbers: The cases.
        seed: Their seed.
        workers: How many processes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "seed").touch()
    before = (folder / "seed").read_text()
    if before not in ("", str(seed)):
        raise ValueError(f"{folder} is of seed {before}, not {seed}")
    (folder / "seed").write_text(str(seed))
    if not (folder / "material").exists():
        _make_material(folder)
    done = {row["case"] for row in rows(folder)}
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in numbers:
        if number not in done:
            waiting.put(number)
    threads = [
        threading.Thread(target=Worker(index, folder, seed).run, args=(waiting,))
        for index in range(workers)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wanted = set(numbers)
    ended = [row for row in rows(folder) if row["case"] in wanted]
    if missing := wanted - {row["case"] for row in ended}:
        errors = [path.read_text()[-500:] for path in folder.glob("worker-*.err")]
        raise RuntimeError(f"{len(missing)} cases did not run: {' '.join(errors)}")
    found = Outcome()
    for row in ended:
        found.tried += 1
        found.taken += row["outcome"] == "taken"
        if row["outcome"] == "fault":
            found.faults.append(row)
    return found


def _make_material(folder: Path) -> None:
    """Make the material in a process of its own, whole or not at all."""
    code = (
        "from mlx_dora import openblas; openblas.preload()\n"
        "import sys, pathlib; from tests.fuzz.material import make_material\n"
        "work = pathlib.Path(sys.argv[1]); make_material(work)\n"
        "work.rename(work.with_name('material'))"
    )
    work = folder / f"making-{os.getpid()}"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(work)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"the fuzzer's material: {done.stderr[-2000:]}")
