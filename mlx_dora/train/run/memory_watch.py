"""Stops a training with a checkpoint before the memory ends."""

import io
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_dora.adapters.config import DoRAConfig
from mlx_dora.data.batches import Batch, Examples, shape_of
from mlx_dora.data.counts import measure_rows
from mlx_dora.data.widths import MOST_SHAPES
from mlx_dora.errors import DoRAError
from mlx_dora.train.config import TrainConfig
from mlx_dora.train.memory import system_memory
from mlx_dora.train.objectives.objective import Objective
from mlx_dora.train.plan.predict import memory_limit, plan_memory

logger = logging.getLogger(__name__)

SHARE = 0.95
"""Share of the memory limit, and of the system's memory, that a training may use."""


@dataclass(kw_only=True)
class MemoryWatch:
    """Watches memory after each update, and bounds what MLX keeps for reuse.

    MLX keeps freed buffers by size, and Metal limits their number (499,000 a process).
    The sizes depend on the shape of a batch, so after 16 other shapes the buffers are
    released.

    Args:
        limit: Bytes that MLX may use; 0 not to watch.
        buffers: Number of buffers that the device allows; 0 if it sets no limit.
        advise: Returns the flags that would fit into some bytes, for a measured peak.
        system: Returns the bytes that the system can still give, and its total.
        shapes: The shapes of batches so far.
        step_arrays: Arrays in the largest step so far; None if they are not counted.
    """

    limit: int
    buffers: int
    advise: Callable[[int, int], Sequence[str]]
    system: Callable[[], tuple[int, int] | None]
    shapes: set[tuple[int, ...]] = field(default_factory=set)
    step_arrays: int | None = None
    _recent: set[tuple[int, ...]] = field(default_factory=set)
    _problem: str = ""
    _fitting: int = 0

    def count(self, outputs: object) -> None:
        """Count the arrays of a step before it is computed; warn if they are too many.

        Arrays are freed while a step is computed, so the count is an upper bound.
        """
        arrays = count_arrays(outputs)
        if arrays > max(self.buffers, self.step_arrays or 0):
            logger.warning(
                "this step makes %s arrays, of which the device holds %s at a time; if "
                "it runs out of them: --grad-checkpoint, shorter rows or fewer rows",
                f"{arrays:,}",
                f"{self.buffers:,}",
            )
        self.step_arrays = max(arrays, self.step_arrays or 0)

    def look(self, window: Sequence[Batch]) -> None:
        """Note the batches of an update, and whether memory is about to end."""
        shapes = [shape_of(tokens) for tokens, *_ in window]
        self.shapes.update(shapes)
        self._recent.update(shapes)
        if len(self._recent) > MOST_SHAPES:
            mx.clear_cache()
            self._recent.clear()
        if not self.limit:
            return
        peak, most = mx.get_peak_memory(), int(SHARE * self.limit)
        if peak > most:
            self._fitting = most
            self._problem = (
                f"MLX's peak of {_size(peak)} is above {SHARE:.0%} of its limit of "
                f"{_size(self.limit)}"
            )
            return
        available, total = self.system() or (1, 1)
        reserve = int((1 - SHARE) * total)
        if available < reserve and self._spare() < reserve - available:
            self._fitting = max(peak - (reserve - available), peak // 2)
            self._problem = (
                f"the system has {_size(available)} of {_size(total)} left, less than "
                f"{1 - SHARE:.0%}"
            )

    @staticmethod
    def _spare() -> int:
        """Bytes given back by releasing the buffers that MLX keeps for reuse."""
        before = mx.get_cache_memory()
        mx.clear_cache()
        return before

    @property
    def is_full(self) -> bool:
        """Whether the last look found that memory is about to end."""
        return bool(self._problem)

    def error(self, step: int, folder: Path) -> DoRAError:
        """The error that ends the training, with flags that would fit."""
        flags = self.advise(mx.get_peak_memory(), self._fitting or self.limit)
        return DoRAError(
            f"{self._problem or 'another process is short of memory'}: stopped after "
            f"step {step} with a checkpoint in {folder}. These flags would fit: "
            f"{' '.join(flags)} (with --resume --force to go on from there, or "
            "--memory-limit 0 to let it run)."
        )


def watch_memory(
    train: TrainConfig, dora: DoRAConfig, data: Examples, objective: Objective
) -> MemoryWatch:
    """Watch the memory of a training on these examples."""
    limit = memory_limit() if train.memory_limit is None else train.memory_limit
    advise = partial(_fitting_flags, train, dora, data, objective)
    buffers = int(mx.device_info().get("resource_limit", 0))  # Metal's
    return MemoryWatch(
        limit=limit, buffers=buffers, advise=advise, system=system_memory
    )


def count_arrays(outputs: object) -> int:
    """Number of arrays that must be computed for some outputs, themselves included."""
    graph = io.StringIO()
    leaves: list[Any] = [value for _, value in tree_flatten(outputs)]
    mx.export_to_dot(graph, *leaves)
    return graph.getvalue().count('-> "')


def count_live(*trees: object) -> int:
    """Number of arrays in some trees, each of which holds a buffer."""
    return sum(len(tree_flatten(tree)) for tree in trees)


def _fitting_flags(
    train: TrainConfig,
    dora: DoRAConfig,
    data: Examples,
    objective: Objective,
    peak: int,
    fitting: int,
) -> Sequence[str]:
    """Flags with which a training fits into some bytes.

    Args:
        train: Settings of the training.
        dora: Settings of the adapter.
        data: The training examples.
        objective: What the training minimizes.
        peak: Measured peak; the plan is scaled so that it predicts this.
        fitting: Bytes to fit into.
    """
    sizes = measure_rows(data, objective.unit or 1, train.max_seq_length)
    sizes = sizes.lengthened(objective.added_tokens)
    plan = partial(
        plan_memory,
        train,
        dora,
        lengths=sizes,
        objective=objective,
        processes=mx.distributed.init().size(),
    )
    try:
        scaled = int(fitting * plan(limit=fitting).peak / peak)
        flags = plan(limit=scaled).advice
    except DoRAError as error:
        logger.info("no plan of the memory: %s", error)
        flags = ()
    return flags or _smaller(train)


def _smaller(train: TrainConfig) -> Sequence[str]:
    """Flags that need less memory, for a model without a plan."""
    steps = f"--grad-accumulation-steps {2 * train.grad_accumulation_steps}"
    if not train.grad_checkpoint:
        return ("--grad-checkpoint",)
    if train.batch_tokens is not None:
        return (f"--batch-tokens {train.batch_tokens // 2}", steps)
    if train.batch_size > 1:
        return (f"--batch-size {train.batch_size // 2}", steps)
    return (f"--max-seq-length {train.max_seq_length // 2}",)


def _size(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 10**9 else f"{count / 1e6:,.1f} MB"
