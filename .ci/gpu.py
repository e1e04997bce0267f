"""Check mlx_dora on a GPU, Apple's or NVIDIA's, and collect what it says.

    python .ci/gpu.py REPORT          # in a checkout, after pip install -e '.[dev]'

Writes the folder REPORT: `report.json` with the result and the seconds of each part,
`doctor.json`, `ten_steps.json`, and the output of each part as text. A part that fails
does not stop the others. Exits with 1 if any part failed, and with 2 without a GPU
(`--anyway` runs on a CPU too, where kernels are skipped).

On a Mac, tests run with Metal's API validation (METAL_DEVICE_WRAPPER_TYPE=1). Doctor
and the training do not, because validation changes times.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = ("-p", "no:cacheprovider", "-n", "0", "-q", "--tb=short", "-rfE")


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of the check.

    Attributes:
        name: Name of the part and of its text file.
        command: Arguments of Python; ``OUT`` stands for the report's folder.
        limit_s: Seconds after which it is stopped.
        is_validated: Whether Metal validates its calls.
    """

    name: str
    command: tuple[str, ...]
    limit_s: int
    is_validated: bool = False


def tests(name: str, *paths: str, limit_s: int) -> Part:
    """Return the part that runs these tests."""
    command = ("-m", "pytest", *TESTS, *paths)
    return Part(name=name, command=command, limit_s=limit_s, is_validated=True)


PARTS = (
    Part(
        name="doctor",
        command=("-m", "mlx_dora.doctor", "--json", "OUT/doctor.json"),
        limit_s=600,
    ),
    tests("grid", "tests/kernels/test_on_gpu.py", limit_s=1200),
    tests("layers", "tests/layers", limit_s=900),
    tests(
        "kernels", "tests/kernels", "--ignore=tests/kernels/test_on_gpu.py", limit_s=600
    ),
    tests(
        "train",
        "tests/train/test_stepper.py",
        "tests/train/run/test_loop.py",
        "tests/train/run/test_kernels.py",
        limit_s=600,
    ),
    Part(
        name="ten_steps",
        command=(".ci/ten_steps.py", "OUT/ten_steps.json"),
        limit_s=900,
    ),
)


@dataclass(frozen=True, kw_only=True)
class Result:
    """What became of a part: its exit status (124: stopped), seconds and last line."""

    name: str
    status: int
    seconds: float
    last_line: str


def run(part: Part, out: Path) -> Result:
    """Run a part with its output in a file."""
    env = dict(os.environ)
    if part.is_validated and sys.platform == "darwin":
        env["METAL_DEVICE_WRAPPER_TYPE"] = "1"
    command = [word.replace("OUT", str(out)) for word in part.command]
    log = out / f"{part.name}.txt"
    began = time.perf_counter()
    with log.open("w") as file:
        try:
            done = subprocess.run(
                [sys.executable, *command],
                cwd=ROOT,
                env=env,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=part.limit_s,
                check=False,
            )
            status = done.returncode
        except subprocess.TimeoutExpired:
            status = 124
    lines = log.read_text(errors="replace").split("\n")
    said = [line.strip() for line in lines if line.strip()]
    return Result(
        name=part.name,
        status=status,
        seconds=round(time.perf_counter() - began, 1),
        last_line=shortened(said[-1])[:200] if said else "",
    )


def shortened(text: str) -> str:
    """Return a text without the home folder, which names its owner."""
    return text.replace(str(Path.home()), "~")


def main() -> int:
    """Run the parts, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("report", type=Path)
    parser.add_argument("--anyway", action="store_true", help="also without a GPU")
    parser.add_argument("--only", nargs="+", choices=[part.name for part in PARTS])
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from mlx_dora.kernels.choice import device_facts
    from mlx_dora.kernels.dispatch import device_backend

    if device_backend() == "reference" and not options.anyway:
        print("MLX has no GPU here, so the kernels cannot be checked (--anyway: run).")
        return 2
    out = options.report.resolve()
    out.mkdir(parents=True, exist_ok=True)
    wanted = [p for p in PARTS if options.only is None or p.name in options.only]
    results = []
    for part in wanted:
        results.append(run(part, out))
        r = results[-1]
        verdict = "ok" if r.status == 0 else f"FAILED ({r.status})"
        print(f"{r.name:10} {verdict:14} {r.seconds:7.1f} s  {r.last_line}", flush=True)
    content = {
        "device": device_facts(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "parts": [asdict(result) for result in results],
    }
    (out / "report.json").write_text(json.dumps(content, indent=1) + "\n")
    print(f"Please paste {out / 'report.json'} and doctor.json into an issue.")
    return int(any(result.status for result in results))


if __name__ == "__main__":
    sys.exit(main())
