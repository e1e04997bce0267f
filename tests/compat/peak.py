"""Peak memory of this process, for measurements in processes of their own."""

import resource
import sys
from pathlib import Path


def peak_bytes() -> int:
    """The largest resident set. `getrusage` would count the parent's too on Linux."""
    if sys.platform == "linux":
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on a Mac
