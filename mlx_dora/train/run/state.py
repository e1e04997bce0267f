"""Where a training stands, its arrays apart: what a checkpoint's state.json holds."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mlx_dora.errors import DoRAError


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """Where a training stands, its arrays apart.

    Args:
        step: Batches done. With the seed it gives the place in the data and all that
            is drawn at random in later steps.
        log_bytes: Length of ``log.jsonl``.
        meter: Sums since the last report and totals, see `Meter.state`.
        guard: Steps that were passed over, see `Guard.state`.
        best: The best validation so far, see `Best.state`.
        settings: All that must stay the same for the run to go on as it was.
    """

    step: int
    log_bytes: int
    meter: dict[str, Any]
    guard: dict[str, Any]
    best: dict[str, Any]
    settings: dict[str, Any]


_Check = tuple[str, Callable[[Any], bool]]


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


_COUNT: _Check = ("a whole number of at least 0", _is_count)
_COUNT_OR_NULL: _Check = (_COUNT[0], lambda value: value is None or _is_count(value))
_NUMBER: _Check = ("a finite number", _is_number)
_NUMBER_OR_NULL: _Check = (_NUMBER[0], lambda value: value is None or _is_number(value))
_SECONDS: _Check = (
    "a number of at least 0",
    lambda value: _is_number(value) and value >= 0,
)
_OBJECT: _Check = ("an object", lambda value: isinstance(value, dict))

_FIELDS: dict[str, _Check] = {
    "step": _COUNT,
    "log_bytes": _COUNT,
    "meter.loss": _NUMBER,
    "meter.tokens": _COUNT,
    "meter.batches": _COUNT,
    "meter.step_seconds": _SECONDS,
    "meter.trained_tokens": _COUNT,
    "meter.seconds": _SECONDS,
    "guard.in_a_row": _COUNT,
    "guard.empty": _COUNT,
    "guard.not_finite": _COUNT,
    "best.loss": _NUMBER_OR_NULL,
    "best.step": _COUNT_OR_NULL,
    "best.since": _COUNT,
    "settings": _OBJECT,
}


def parse_state(content: Mapping[str, Any], step: int) -> TrainState:
    """Read the content of ``state.json``, each field checked by type and range.

    Args:
        content: The parsed file.
        step: What the name of the checkpoint's folder says.

    Raises:
        DoRAError: Naming every field that is missing or bad.
    """
    problems = []
    for name, (must_be, is_good) in _FIELDS.items():
        group, _, key = name.rpartition(".")
        inside = content.get(group) if group else content
        if not isinstance(inside, Mapping) or key not in inside:
            problems.append(f"{name} is missing")
        elif not is_good(inside[key]):
            problems.append(f"{name} must be {must_be}, got {inside[key]!r:.40}")
    if not problems and content["step"] != step:
        problems.append(f"step is {content['step']} in the folder of step {step}")
    if problems:
        raise DoRAError("; ".join(problems))
    names = ("step", "log_bytes", "meter", "guard", "best", "settings")
    return TrainState(**{name: content[name] for name in names})
