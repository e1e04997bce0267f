"""Counts and times of the server, in the text format of Prometheus."""

import bisect
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

PREFIX = "mlx_dora_"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_BOUNDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)

_COUNTERS = {
    "requests_total": "Completed requests by adapter and HTTP status.",
    "prompt_tokens_total": "Tokens of prompts by adapter.",
    "cached_tokens_total": "Tokens of prompts taken from the prompt cache, by adapter.",
    "generated_tokens_total": "Generated tokens by adapter.",
}
_HISTOGRAMS = {
    "request_seconds": "Seconds from a request's arrival to the end of its answer.",
    "first_token_seconds": "Seconds from a request's arrival to its first token.",
}

Labels = tuple[tuple[str, str], ...]


@dataclass
class _Times:
    counts: list[int] = field(default_factory=lambda: [0] * (len(_BOUNDS) + 1))
    total: float = 0.0


class Metrics:
    """Counters and histograms; usable from several threads.

    Args:
        gauges: Functions that return a current value, by name and help text.
    """

    def __init__(self, gauges: Mapping[tuple[str, str], Callable[[], float]]) -> None:
        self._gauges = dict(gauges)
        self._counts: dict[str, dict[Labels, float]] = {name: {} for name in _COUNTERS}
        self._times = {name: _Times() for name in _HISTOGRAMS}
        self._lock = threading.Lock()

    def count(self, name: str, amount: float = 1, **labels: str) -> None:
        """Add to a counter."""
        key = tuple(sorted(labels.items()))
        with self._lock:
            self._counts[name][key] = self._counts[name].get(key, 0) + amount

    def observe(self, name: str, seconds: float) -> None:
        """Add a duration to a histogram."""
        with self._lock:
            times = self._times[name]
            times.counts[bisect.bisect_left(_BOUNDS, seconds)] += 1
            times.total += seconds

    def render(self) -> str:
        """Return all metrics in the text format of Prometheus."""
        lines: list[str] = []
        for (name, text), value in self._gauges.items():
            lines += [*_head(name, text, "gauge"), f"{PREFIX}{name} {value():g}"]
        with self._lock:
            for name, text in _COUNTERS.items():
                lines += _head(name, text, "counter")
                lines += [
                    f"{PREFIX}{name}{_labels(labels)} {value:.15g}"
                    for labels, value in self._counts[name].items()
                ]
            for name, text in _HISTOGRAMS.items():
                lines += _head(name, text, "histogram")
                lines += _buckets(name, self._times[name])
        return "\n".join(lines) + "\n"


def _head(name: str, text: str, kind: str) -> list[str]:
    return [f"# HELP {PREFIX}{name} {text}", f"# TYPE {PREFIX}{name} {kind}"]


def _labels(labels: Labels) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{name}="{_escaped(v)}"' for name, v in labels) + "}"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _buckets(name: str, times: _Times) -> list[str]:
    lines, total = [], 0
    bounds = [*(f"{bound:g}" for bound in _BOUNDS), "+Inf"]
    for bound, count in zip(bounds, times.counts, strict=True):
        total += count
        lines.append(f'{PREFIX}{name}_bucket{{le="{bound}"}} {total}')
    return [
        *lines,
        f"{PREFIX}{name}_sum {times.total:.6f}",
        f"{PREFIX}{name}_count {total}",
    ]
