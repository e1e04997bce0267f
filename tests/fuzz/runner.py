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

ROOT = Path(__file__).parents[2]
MAX_SECONDS = 20.0
"""Of processor time for one case, so that a busy machine makes no fault."""
MAX_BYTES = 2 * 10**9
_POLL = 0.05
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


class _Worker:
    """One worker process and its log."""

    def __init__(self, index: int, folder: Path, seed: int) -> None:
        self._scratch = folder / f"scratch-{index}"
        self._args = [
            sys.executable, "-m", "tests.fuzz.worker", str(folder / "material"),
            str(self._scratch), str(seed), str(folder / f"worker-{index}.jsonl"),
        ]  # fmt: skip
        self.log = folder / f"worker-{index}.jsonl"
        self._errors = folder / f"worker-{index}.err"
        self._process: subprocess.Popen[str] | None = None

    def run(self, numbers: "queue.SimpleQueue[int]") -> None:
        """Try cases until there are no more numbers."""
        while not numbers.empty():
            try:
                self._run_process(numbers)
            finally:
                if self._process is not None:
                    self._process.kill()
                    self._process.wait()

    def _run_process(self, numbers: "queue.SimpleQueue[int]") -> None:
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "OPENBLAS_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
        position = self.log.stat().st_size if self.log.exists() else 0
        with self._errors.open("w") as errors:
            self._process = process = subprocess.Popen(
                self._args,
                stdin=subprocess.PIPE,
                stderr=errors,
                text=True,
                cwd=ROOT,
                env=environment,
            )
        assert process.stdin is not None
        given, ended, begun, started = 0, 0, None, 0.0
        with self.log.open(encoding="utf-8") if position else _made(self.log) as log:
            log.seek(position)
            while True:
                while given - ended < _AHEAD and not numbers.empty():
                    with contextlib.suppress(queue.Empty, BrokenPipeError):
                        number = numbers.get_nowait()
                        process.stdin.write(f"{number}\n")
                        process.stdin.flush()
                        given += 1
                for line in log:
                    row = json.loads(line)
                    if "begun" in row:
                        begun, started = row, _cpu_seconds(process.pid)
                    elif "case" in row:
                        begun, ended = None, ended + 1
                if ended == given and numbers.empty():
                    return
                problem = self._problem(process, begun, started)
                if problem is not None:
                    self._record(begun, problem)
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

    def _record(self, begun: dict | None, problem: str) -> None:
        row = {**(begun or {"kind": "", "what": "", "damage": ""})}
        row["case"] = row.pop("begun", -1)
        with self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**row, "outcome": "fault", "detail": problem}))
            file.write("\n")


def _made(path: Path):
    path.touch()
    return path.open(encoding="utf-8")


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
        threading.Thread(target=_Worker(index, folder, seed).run, args=(waiting,))
        for index in range(workers)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = Outcome()
    wanted = set(numbers)
    for row in rows(folder):
        if row["case"] in wanted or row["case"] == -1:
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
