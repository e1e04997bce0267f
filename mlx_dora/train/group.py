"""What the processes of one training tell each other.

Only the first process reads and writes the adapter's folder: the others may run on
machines that do not have it.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_dora.errors import DoRAError

_WORDS = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}


class SharedError(DoRAError):
    """What went wrong in one process or more; every process of the group raises it."""


def greatest(number: int, group: mx.distributed.Group) -> int:
    """The greatest of the processes' numbers, so that all do the same."""
    if group.size() == 1:
        return number
    return int(mx.distributed.all_max(mx.array(number), group=group))


@contextmanager
def together(group: mx.distributed.Group) -> Iterator[None]:
    """A part of the work that all processes get through, or none.

    Nothing inside may wait for another process. One process alone keeps its errors as
    they are.

    Raises:
        SharedError: In every process, if a `DoRAError` or `OSError` came up in any.
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
    """What one process holds, in all of them; anything that JSON takes."""
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
    """The first process's values, bit for bit, in all of them.

    Args:
        tensors: Of the same names, shapes and dtypes everywhere.
        group: The processes.
    """
    if group.size() == 1:
        return dict(tensors)
    shared = {}
    for name, value in tensors.items():
        # As whole numbers, to which 0 is added: -0.0 and NaN come through.
        words = mx.view(value.reshape(-1), _WORDS[value.dtype.size])
        words = words if group.rank() == 0 else mx.zeros_like(words)
        words = mx.distributed.all_sum(words, group=group)
        mx.eval(words)
        shared[name] = mx.view(words, value.dtype).reshape(value.shape)
    return shared


def check_alike(settings: dict[str, Any], group: mx.distributed.Group) -> None:
    """Refuse processes that were started for different trainings.

    Args:
        settings: All that must be the same in each.
        group: The processes.

    Raises:
        SharedError: Listing what differs.
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
