"""Time from the start of every command to its first output, on a terminal.

    python benchmarks/first_output.py [--runs N] [COMMAND ...]

Runs each console script of the installed package in a pseudo-terminal: with ``--help``,
and on the demo's model up to the first printed character, when the command is stopped;
the subcommands and other long ways through a command, too.
Fails if a first output takes over a second or a help over .4 s. The help of generate,
chat and server ends with mlx-lm's, which only importing mlx-lm can give: there our own
part counts. The model of ``mlx_dora.demo`` is made first if it is missing.
"""

import argparse
import os
import pty
import re
import select
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from importlib.metadata import entry_points
from pathlib import Path
from statistics import median

from _machine import describe_machine

FIRST_LIMIT, HELP_LIMIT = 1.0, 0.4  # seconds
GIVE_UP = 60.0
HOSTED = ("mlx_dora.generate", "mlx_dora.chat", "mlx_dora.server")
_CODES = re.compile(rb"\x1b\[[0-9;?]*[a-zA-Z]|\x1b\][^\x07]*\x07")


def commands() -> list[str]:
    """Return the names of the installed console scripts."""
    scripts = entry_points(group="console_scripts")
    return sorted(s.name for s in scripts if s.value.startswith("mlx_dora."))


def real_jobs(work: Path) -> dict[str, list[str]]:
    """Make small inputs from the demo's model; return jobs of every command.

    A key starts a command line, and its value ends it.
    """
    from mlx_dora import DoRAConfig, apply_dora, load, save_adapter
    from mlx_dora.demo.data import write_demo_data
    from mlx_dora.demo.model import demo_model

    base = str(demo_model())
    data, adapter = str(work / "data"), str(work / "adapter")
    write_demo_data(data)
    model, _ = load(base)
    apply_dora(model, DoRAConfig(rank=4, num_layers=2))
    save_adapter(model, adapter)
    out = ["--save-path", str(work / "out")]
    train = ["--model", base, "--data", data, "--adapter-path", str(work / "trained")]
    return {
        "mlx_dora": [],
        "mlx_dora.analyze adapter": [adapter],
        "mlx_dora.analyze compare": [adapter, adapter],
        "mlx_dora.analyze models": [base, base],
        "mlx_dora.chat --adapter-path": [adapter],
        "mlx_dora.chat --model": [base, "--adapter-path", adapter],
        "mlx_dora.convert --to lora": [adapter, str(work / "lora"), "--rank", "4"],
        "mlx_dora.convert --to peft": [adapter, str(work / "peft")],
        "mlx_dora.data": [data, "--model", base],
        "mlx_dora.demo": ["--output", str(work / "demo")],
        "mlx_dora.doctor": [],
        "mlx_dora.evaluate": ["--adapter-path", adapter, "--data", data],
        "mlx_dora.extract": [base, base, "--rank", "4", *out],
        "mlx_dora.fuse": ["--adapter-path", adapter, *out],
        "mlx_dora.generate": ["--adapter-path", adapter, "--prompt", "Hello"],
        "mlx_dora.merge adapters": [adapter, adapter, *out],
        "mlx_dora.merge fisher": ["--model", base, "--data", data, *out],
        "mlx_dora.merge models": [base, base, *out],
        "mlx_dora.server --adapter": [f"a={adapter}", "--port", "0"],
        "mlx_dora.server --adapter-path": [adapter, "--port", "0"],
        "mlx_dora.server --model": [base, "--port", "0"],
        "mlx_dora.train": train,
        "mlx_dora.train --plan": train,
    }


def seconds(words: list[str], *, to_the_end: bool) -> tuple[float, str]:
    """Return a command's time to its first output, or to its end; and that output."""
    screen, terminal = pty.openpty()
    start = time.monotonic()
    process = subprocess.Popen(
        words, stdin=terminal, stdout=terminal, stderr=terminal, process_group=0
    )
    os.close(terminal)
    shown, end = b"", float("nan")
    try:
        while time.monotonic() - start < GIVE_UP:
            if not select.select([screen], [], [], 0.5)[0]:
                continue
            try:
                block = os.read(screen, 1 << 16)
            except OSError:  # the command has ended
                break
            shown += block
            if not to_the_end and _CODES.sub(b"", shown).strip():
                break
        end = time.monotonic() - start
        if not to_the_end:
            os.killpg(process.pid, signal.SIGKILL)
        if process.wait(GIVE_UP) not in (0, 2, -signal.SIGKILL):
            raise SystemExit(f"{' '.join(words)} failed:\n{shown.decode()}")
    finally:
        os.close(screen)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    if not shown:
        raise SystemExit(f"{' '.join(words)} printed nothing")
    return end, _CODES.sub(b"", shown).decode(errors="replace").strip()


def main() -> int:
    """Print the table; return 1 if a command is too slow."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--runs", type=int, default=3, help="median of this many runs")
    parser.add_argument("only", nargs="*", metavar="COMMAND", help="default: all")
    options = parser.parse_args()
    scripts = Path(sysconfig.get_path("scripts"))
    print(
        f"{'command':<30} {'--help':>6} {'first':>6}  (seconds, medians) what is shown"
    )
    slow = []
    with tempfile.TemporaryDirectory() as folder:
        jobs = real_jobs(Path(folder))
        if missing := set(commands()) - {job.split()[0] for job in jobs}:
            raise SystemExit(f"no job for {', '.join(sorted(missing))}")
        for job, rest in jobs.items():
            name, *way = job.split()
            if options.only and name not in options.only:
                continue
            program = str(scripts / name)
            group = [word for word in way[:1] if not word.startswith("-")]
            helps = [[program, *group, "--help"]] * options.runs
            starts = [[program, *way, *rest]] * options.runs
            whole = name not in HOSTED
            help_time = median(seconds(w, to_the_end=whole)[0] for w in helps)
            shown = [seconds(words, to_the_end=False) for words in starts]
            first = median(time for time, _ in shown)
            is_slow = help_time > HELP_LIMIT or first > FIRST_LIMIT
            slow += [job] * is_slow
            line = shown[0][1].splitlines()[0][:32] + "  SLOW" * is_slow
            print(f"{job:<30} {help_time:6.2f} {first:6.2f}  {line}")
    print(describe_machine())
    if slow:
        print(f"over {HELP_LIMIT} s for --help or {FIRST_LIMIT} s: {', '.join(slow)}")
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
