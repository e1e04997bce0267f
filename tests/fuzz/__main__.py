"""Damaged inputs by the thousand: ``python -m tests.fuzz --count 2000``.

Every case is made from its number and the seed alone. ``--state FOLDER`` keeps what
was tried, so that a run that was stopped goes on; ``--case N`` tries one again and
prints its outcome.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from tests.fuzz.runner import fuzz, rows


def main() -> int:
    """Parse the command line, fuzz, and print what was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=min(os.cpu_count() or 1, 4))
    parser.add_argument("--state", type=Path)
    parser.add_argument("--case", type=int)
    args = parser.parse_args()
    numbers = range(args.start, args.start + args.count)
    with tempfile.TemporaryDirectory(prefix="mlx_dora-fuzz.") as temporary:
        folder = (args.state or Path(temporary)).resolve()
        began = time.monotonic()
        if args.case is not None:
            fuzz(folder, [args.case], args.seed, 1)
            for row in rows(folder):
                if row["case"] == args.case:
                    sys.stdout.write(json.dumps(row, indent=1) + "\n")
            return 0
        found = fuzz(folder, numbers, args.seed, args.workers)
    seconds = time.monotonic() - began
    lines = [*found.lines(), f"{seconds:.0f} s"]
    sys.stdout.write("\n".join(lines) + "\n")
    return 1 if found.faults else 0


if __name__ == "__main__":
    sys.exit(main())
