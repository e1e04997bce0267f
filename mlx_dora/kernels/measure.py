"""Measures kernels against plain MLX before a run, and keeps what was chosen."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx

from mlx_dora.kernels.adapted_norm import job as adapted_norm_job
from mlx_dora.kernels.case import DORA_SCALE, Case
from mlx_dora.kernels.choice import (
    add_choices,
    choices,
    device_facts,
    device_text,
    pin,
    read_again,
)
from mlx_dora.kernels.dispatch import chosen_mode
from mlx_dora.kernels.fused_weight import job as fused_weight_job
from mlx_dora.kernels.kept import Choices, keep, locked
from mlx_dora.kernels.normalize_rows import job as normalize_rows_job
from mlx_dora.kernels.rescale import job as dora_scale_job
from mlx_dora.kernels.trial import Job, judge, report

logger = logging.getLogger(__name__)

_JOBS: dict[str, Callable[[Case], Job]] = {
    "normalize_rows": normalize_rows_job,
    "adapted_norm": adapted_norm_job,
    "fused_weight": fused_weight_job,
    DORA_SCALE: dora_scale_job,
}


@dataclass(frozen=True, kw_only=True)
class Decisions:
    """What the ops of a run use, as its log and its checkpoints record it.

    Attributes:
        kernels: ``auto``, ``forced`` or ``reference``.
        device: Chip, MLX version and hash of the kernels' text.
        taken: Whether ``auto`` takes the kernel, by case.
    """

    kernels: str
    device: dict[str, str]
    taken: dict[str, bool] = field(default_factory=dict)

    @property
    def is_of_this_device(self) -> bool:
        """Whether mode and device are those of this process."""
        return (self.kernels, self.device) == (chosen_mode(), device_facts())

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Take these decisions for all calls inside; cases not among them are plain."""
        pin(self.taken)
        try:
            yield
        finally:
            pin(None)


def job_of(case: Case) -> Job:
    """Return both sides of a case."""
    return _JOBS[case.op](case)


def decide(cases: Iterable[Case], recorded: dict[str, Any] | None = None) -> Decisions:
    """Choose for every case of a run, and measure those without a choice.

    Args:
        cases: The calls of the run.
        recorded: The decisions of the run that is resumed, as values of JSON. On the
            same device they are returned, so that the run computes the same bits. A
            difference of devices is logged as a warning.
    """
    here = Decisions(kernels=chosen_mode(), device=dict(device_facts()))
    if recorded:
        before = Decisions(**recorded)
        if before.is_of_this_device:
            return before
        logger.warning(
            "the checkpoint was computed elsewhere: %s. The resumed run may differ "
            "from an uninterrupted run in its last bits.",
            _difference(before, here),
        )
    if here.kernels != "auto":
        return here
    points = {point.text: point for case in cases for point in case.points()}
    known = _measured(points)
    return replace(here, taken={text: known[text].takes_kernel for text in points})


def _difference(before: Decisions, here: Decisions) -> str:
    pairs = [("kernels", before.kernels, here.kernels)]
    pairs += [
        (name, before.device.get(name), here.device.get(name))
        for name in sorted({*before.device, *here.device})
    ]
    return "; ".join(f"{name} was {a}, is {b}" for name, a, b in pairs if a != b)


def _measured(points: dict[str, Case]) -> Choices:
    """Return the choice of each point, measured unless it is known.

    Only one process measures at a time. It takes what the others have kept.
    """
    if all(text in choices() for text in points):
        known = choices()
    else:
        with locked():
            read_again()
            known = choices()
            missing = [p for text, p in points.items() if text not in known]
            if missing:
                known = {**known, **_measure(missing)}
    for text, point in points.items():
        report(point, known[text])
    return known


def _measure(points: list[Case]) -> Choices:
    logger.info("Measuring %d kinds of calls, once on this device ...", len(points))
    began = time.perf_counter()
    new = {}
    for point in points:
        new[point.text] = judge(point, job_of(point))
        mx.clear_cache()
    add_choices(new)
    keep(device_text(), new)
    logger.info(
        "Kernels are faster for %d of %d; measured in %.1f s",
        sum(choice.takes_kernel for choice in new.values()),
        len(new),
        time.perf_counter() - began,
    )
    return new
