"""GPU time of the kernels of a call, by CUPTI through torch's profiler.

It sees MLX's kernels too, since CUPTI records all of a process. Without torch or a GPU,
every function returns None.
"""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

_KINDS = ("kernel", "gpu_memcpy", "gpu_memset")


def microseconds(call: Callable[[int], Any], calls: int) -> float | None:
    """Return the GPU's busy time of a call, the mean over `calls` calls."""
    events = _events(call, calls)
    return None if not events else sum(e["dur"] for e in events) / calls


def _events(call: Callable[[int], Any], calls: int) -> list[dict[str, Any]] | None:
    try:
        import torch  # pyright: ignore[reportMissingImports]
        from torch.profiler import (  # pyright: ignore[reportMissingImports]
            ProfilerActivity,
            profile,
        )
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    torch.zeros(8, device="cuda").add_(1)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for number in range(calls):
            call(number)
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as work:
        path = Path(work) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return [event for event in events if event.get("cat") in _KINDS]
