"""Records which hosts the tests ran; `docs/_hosts.py` makes the table of it.

A test calls `ran` at its end. Records are written only where ``MLX_DORA_HOSTS`` names
the file, as the command in docs/hosts.md does.
"""

import datetime
import importlib.metadata
import json
import os
import subprocess
from pathlib import Path

VARIABLE = "MLX_DORA_HOSTS"


def version_in(python: str, package: str) -> str:
    """The version of a package that another interpreter has."""
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def ran(host: str, what: str, *, package: str = "", version: str = "") -> None:
    """Record that a host passed a test.

    Args:
        host: Name of the host, as in the table.
        what: What was run and compared.
        package: Package whose installed version is recorded.
        version: The version, where no package here has it.
    """
    file = os.environ.get(VARIABLE)
    if not file:
        return
    path = Path(file)
    records = json.loads(path.read_text()) if path.exists() else {}
    records.setdefault(host, {})[what] = {
        "version": version or importlib.metadata.version(package),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    path.write_text(json.dumps(records, indent=2, sort_keys=True) + "\n")
