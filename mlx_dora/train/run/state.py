"""State of a training without its arrays: the content of state.json."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from mlx_dora.errors import DoRAError


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """State of a training, without its arrays.

    Args:
        step: Number of batches done. With the seed, it determines the position in the
            data and the random numbers of later steps.
        log_bytes: Length of ``log.jsonl`` in bytes.
        meter: Sums since the last report and totals, from `Meter`.
        guard: Skipped steps, from `Guard`.
        best: The best validation so far, from `Best`.
        settings: Settings that must be unchanged when the run is resumed.
        kernels: What the ops used (`Decisions` as a dict); empty in checkpoints of
            version 0.1, which did not record it.
        objective: State of the objective, from `Objective.state`.
    """

    step: int
    log_bytes: int
    meter: dict[str, Any]
    guard: dict[str, Any]
    best: dict[str, Any]
    settings: dict[str, Any]
    kernels: dict[str, Any] = field(default_factory=dict)
    objective: dict[str, Any] = field(default_factory=dict)


class Saved:
    """An object of which a checkpoint stores some attributes.

    Attributes:
        saved: Names of the stored attributes.
    """

    saved: ClassVar[tuple[str, ...]]

    def state(self) -> dict[str, Any]:
        """Return the values that a checkpoint stores."""
        return {name: getattr(self, name) for name in self.saved}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore the values of `state`."""
        for name in self.saved:
            setattr(self, name, state[name])


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
_NUMBERS: _Check = (
    "a list of finite numbers",
    lambda value: isinstance(value, list) and all(map(_is_number, value)),
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

_LATER: dict[str, _Check] = {"meter.count": _COUNT, "meter.table": _NUMBERS}
"""Fields that checkpoints of version 0.1 lack."""


def parse_state(content: Mapping[str, Any], step: int) -> TrainState:
    """Read the content of ``state.json``, and check the type and range of each field.

    Args:
        content: Content of the parsed file.
        step: Step in the name of the checkpoint's folder.

    Raises:
        DoRAError: If fields are missing or invalid; names them all.
    """
    problems = []
    for name, (must_be, is_good) in (_FIELDS | _LATER).items():
        group, _, key = name.rpartition(".")
        inside = content.get(group) if group else content
        if name in _LATER and isinstance(inside, Mapping) and key not in inside:
            continue
        if not isinstance(inside, Mapping) or key not in inside:
            problems.append(f"{name} is missing")
        elif not is_good(inside[key]):
            problems.append(f"{name} must be {must_be}, got {inside[key]!r:.40}")
    kernels = content.get("kernels", {})
    if not _are_decisions(kernels):
        problems.append(f"kernels must be what the ops used, got {kernels!r:.40}")
    objective = content.get("objective", {})
    if not isinstance(objective, dict) or not all(map(_is_count, objective.values())):
        problems.append(f"objective must hold whole numbers, got {objective!r:.40}")
    if not problems and content["step"] != step:
        problems.append(f"step is {content['step']} in the folder of step {step}")
    if problems:
        raise DoRAError("; ".join(problems))
    names = ("step", "log_bytes", "meter", "guard", "best", "settings")
    state = {name: content[name] for name in names}
    return TrainState(**state, kernels=kernels, objective=objective)


def _are_decisions(kernels: Any) -> bool:
    """Whether this is a dict of `Decisions`, or an empty dict."""
    if kernels == {}:
        return True
    if not isinstance(kernels, dict) or set(kernels) != {"kernels", "device", "taken"}:
        return False
    device, taken = kernels["device"], kernels["taken"]
    return (
        isinstance(kernels["kernels"], str)
        and isinstance(device, dict)
        and all(isinstance(value, str) for value in device.values())
        and isinstance(taken, dict)
        and all(isinstance(value, bool) for value in taken.values())
    )
