"""Chooses the kernels of a training before its first step, once for all its steps."""

import logging
from dataclasses import asdict
from itertools import islice

from mlx_dora.kernels.dispatch import chosen_mode
from mlx_dora.kernels.measure import Decisions, decide
from mlx_dora.layers.calls import training_cases
from mlx_dora.train.group import share
from mlx_dora.train.run.run import Run

logger = logging.getLogger(__name__)

_SAMPLE = 256
"""Batches from which the numbers of tokens are taken; others run plain MLX."""


def decide_kernels(run: Run) -> Decisions:
    """Return what the steps of a prepared and resumed run use.

    A resumed run uses what its checkpoint recorded. In a group of processes, those on
    the device of the first process use the choices of the first; nothing else is
    measured while it measures.
    """
    sizes = [] if run.kernels else _sizes(run)
    cases = training_cases(run.model, sizes) if sizes else []
    recorded = run.kernels
    first = asdict(decide(cases, recorded)) if run.is_writer else None
    first = Decisions(**share(first, run.group))
    if run.is_writer or first.is_of_this_device:
        decisions = first
    else:
        decisions = decide(cases or training_cases(run.model, _sizes(run)))
    if run.is_writer and decisions.taken:
        logger.info(
            "Kernels run %d of %d kinds of calls, plain MLX the others (log.jsonl "
            "lists them)",
            sum(decisions.taken.values()),
            len(decisions.taken),
        )
    return decisions


def _sizes(run: Run) -> list[int]:
    """Return the numbers of tokens of the first batches; none without a choice."""
    if chosen_mode() != "auto":
        return []
    first = {*islice(run.feed.shapes(run.rows), _SAMPLE)}
    shapes = {step for shape in first for step in run.objective.step_shapes(shape)}
    return sorted({rows * max(width - 1, 1) for rows, width in shapes})
