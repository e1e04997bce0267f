"""Communication between the processes of a training.

Only the first process reads and writes the adapter's folder, because the others may run
on machines that do not have it.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import mlx.core as mx
import numpy as np

from mlx_dora.data.batches import Batch
from mlx_dora.errors import DoRAError

_MOST_COMPARED = 64
"""Batches of an update whose shapes are compared between processes."""

_MARK = 0x5AFE
"""Ends the shapes of a process, to tell them from those of a lost connection."""

PEER_LOST = "connection to a peer was lost"
"""Message of MLX's ring backend when another process has ended."""

_WORDS = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}


class SharedError(DoRAError):
    """An error in at least one process; every process of the group raises it."""


class _Alone:
    """A group of one process, which communicates with no other."""

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 1


def row_group(group: mx.distributed.Group, shard: str | None) -> mx.distributed.Group:
    """Return the processes that share the rows of a batch.

    With tensor parallelism, every process of `group` computes with every row.
    """
    return cast(mx.distributed.Group, _Alone()) if shard == "tensor" else group


def greatest(number: int, group: mx.distributed.Group) -> int:
    """Maximum of a number over the processes, so that all act alike."""
    if group.size() == 1:
        return number
    return int(mx.distributed.all_max(mx.array(number), group=group))


@contextmanager
def together(group: mx.distributed.Group) -> Iterator[None]:
    """Run a block that all processes complete, or none.

    The block must not wait for another process. In a group of one process, errors are
    raised unchanged.

    Raises:
        SharedError: In every process, if any of them raised `DoRAError` or `OSError`.
    """
    if group.size() == 1:
        yield
        return
    problem = None
    try:
        yield
    except (DoRAError, OSError) as error:
        problem = error
    failed = mx.distributed.all_gather(mx.array([problem is not None]), group=group)
    ranks = np.flatnonzero(np.array(failed)).tolist()
    if ranks:
        text = share(str(problem), group, source=ranks[0])
        if ranks[0]:
            text = f"process {ranks[0]}: {text}"
        raise SharedError(text) from problem


def share(value: Any, group: mx.distributed.Group, *, source: int = 0) -> Any:
    """Broadcast a JSON value from the process of rank `source` to all processes."""
    if group.size() == 1:
        return value
    is_source = group.rank() == source
    text = json.dumps(value).encode() if is_source else b""
    length = int(mx.distributed.all_sum(mx.array(len(text)), group=group))
    content = np.frombuffer(text, np.uint8) if is_source else np.zeros(length, np.uint8)
    shared = mx.distributed.all_sum(mx.array(content), group=group)
    return json.loads(np.array(shared).tobytes())


def share_tensors(
    tensors: Mapping[str, mx.array], group: mx.distributed.Group
) -> dict[str, mx.array]:
    """Broadcast the first process's tensors to all processes, bit for bit.

    Args:
        tensors: Tensors with the same names, shapes and dtypes in every process.
        group: The processes.
    """
    if group.size() == 1:
        return dict(tensors)
    shared = {}
    for name, value in tensors.items():
        # Summed as unsigned integers, which preserves -0.0 and NaN.
        words = mx.view(value.reshape(-1), _WORDS[value.dtype.size])
        words = words if group.rank() == 0 else mx.zeros_like(words)
        words = mx.distributed.all_sum(words, group=group)
        mx.eval(words)
        shared[name] = mx.view(words, value.dtype).reshape(value.shape)
    return shared


def check_same_shapes(window: Sequence[Batch], group: mx.distributed.Group) -> None:
    """Refuse batches whose shapes differ between processes.

    Processes that divide a model's weights communicate within each pass.

    Raises:
        SharedError: If shapes differ.
    """
    if group.size() == 1:
        return
    shapes = np.zeros((_MOST_COMPARED + 1, 2), np.int32)
    shapes[-1] = _MARK
    for place, (tokens, *_) in enumerate(window[:_MOST_COMPARED]):
        shapes[place] = tokens.shape
    every = mx.distributed.all_gather(mx.array(shapes)[None], group=group)
    shared = np.array(every)
    if (shared[:, -1] != _MARK).any():  # what MLX gives when a process has ended
        raise RuntimeError(PEER_LOST)
    all_shapes = shared[:, :-1].tolist()
    if any(own != all_shapes[0] for own in all_shapes):
        listed = "; ".join(
            f"{[tuple(shape) for shape in own if any(shape)]} in process {rank}"
            for rank, own in enumerate(all_shapes)
        )
        raise SharedError(
            f"with shard, batches must have the same shape in every process: {listed}. "
            "Make such batches, or train without shard."
        )


def check_alike(settings: dict[str, Any], group: mx.distributed.Group) -> None:
    """Refuse processes that were started with different settings.

    Args:
        settings: Settings that must be the same in every process.
        group: The processes.

    Raises:
        SharedError: If settings differ; lists the differences.
    """
    first = share(settings, group)
    differences = [
        f"{name} is {first.get(name)!r} in process 0 and {settings.get(name)!r} here"
        for name in sorted({*first, *settings})
        if first.get(name) != settings.get(name)
    ]
    with together(group):
        if differences:
            raise DoRAError(
                f"{'; '.join(differences)}. Give every machine the same options, model "
                "and data."
            )
