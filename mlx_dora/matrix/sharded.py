"""A frozen weight whose rows or columns are divided among the processes of a group.

Each process holds the same number of consecutive rows (or columns), dense or packed.
What depends on a row alone (its norm) is computed from the own rows, and only the
result, one number per row, is gathered. Of columns, each process has a part of every
sum along a row, and the parts are summed.

Where the processes have batches of their own (``shard full``), the whole weight exists
only while a product with it is computed: the forward and the backward pass each gather
it again.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import cast

import mlx.core as mx

from mlx_dora.matrix.packed import QuantizedWeight


class _Order:
    """The last message of a pass, for which the next one waits."""

    def __init__(self) -> None:
        self.last: mx.array | None = None
        self.is_paused = False


_ORDER: ContextVar[_Order | None] = ContextVar("order", default=None)


@contextmanager
def in_order() -> Iterator[None]:
    """Send the messages of a pass, forward and backward, in the order of their calls.

    MLX orders what does not depend on each other by the graph, which may differ between
    processes (as with packed rows of different documents). Messages of equal size would
    then be taken for each other. Use this inside a compiled function, not around it.
    """
    token = _ORDER.set(_Order())
    try:
        yield
    finally:
        _ORDER.reset(token)


def pause_order(is_paused: bool) -> None:
    """Leave messages that are not going to be sent out of the order, or go on with it.

    A message that waits for one in the order causes that one to be sent.
    """
    if (order := _ORDER.get()) is not None:
        order.is_paused = is_paused


def _in_turn(arrays: list[mx.array], after: Sequence[mx.array] = ()) -> list[mx.array]:
    """Return arrays that wait for others, and for the last message in the order."""
    order, waits = _ORDER.get(), list(after)
    if order is not None and order.last is not None:
        waits.append(order.last)
    return mx.depends(arrays, waits) if waits else arrays


def _end_turn(result: mx.array) -> None:
    order = _ORDER.get()
    if order is not None and not order.is_paused:
        order.last = result


Part = mx.array | QuantizedWeight
"""A matrix of rows that a process holds, or that it has gathered."""


@dataclass(frozen=True, kw_only=True)
class ShardedWeight:
    """A weight of shape ``(out, in)``, of which this process holds some rows.

    Attributes:
        part: This process's rows. Shape ``(out / processes, in)``; or its columns,
            shape ``(out, in / processes)``.
        group: The processes, in the order of their rows.
        squares: ‖W0‖² of every row, shape ``(out,)``, float32; None if not known.
        axis: The divided axis: 0 for rows, 1 for columns.
    """

    part: Part
    group: mx.distributed.Group
    squares: mx.array | None = None
    axis: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape ``(out, in)`` of the whole weight."""
        shape = [*self.part.shape]
        shape[self.axis] *= self.group.size()
        return tuple(shape)

    @property
    def own(self) -> slice:
        """The rows (or columns) of the whole weight that this process holds."""
        return own_rows(self.shape[self.axis], self.group)

    def summed(self, values: mx.array) -> mx.array:
        """Sum what each process has computed from its columns.

        No gradient flows through the result.
        """
        return mx.stop_gradient(mx.distributed.all_sum(values, group=self.group))

    def gathered(self, values: mx.array) -> mx.array:
        """Gather values of the own rows ``(rows, ...)`` to those of all ``(out, ...)``.

        No gradient flows through the result.
        """
        return mx.stop_gradient(mx.distributed.all_gather(values, group=self.group))

    def whole(self, after: Sequence[mx.array] = ()) -> Part:
        """Gather the whole weight; all processes must make this call.

        Args:
            after: Arrays to wait for, so that weights are not gathered long before
                they are used.
        """
        parts = _arrays_of(self.part)
        arrays = _in_turn(list(parts.values()), after)
        gather = gather_columns if self.axis else gather_rows
        whole = gather(arrays, self.group)
        _end_turn(whole[-1])
        if isinstance(self.part, QuantizedWeight):
            return replace(self.part, **dict(zip(parts, whole, strict=True)))
        return whole[0]

    def matmul(self, x: mx.array) -> mx.array:
        r"""Return :math:`x W^\top`, and keep no gathered weight for the backward pass.

        Args:
            x: Input, shape ``(..., in)``, of the same shape in every process.

        Returns:
            The product, shape ``(..., out)``, in MLX's dtype for it.
        """

        @mx.custom_function
        def run(x: mx.array) -> mx.array:
            return product_with(self.whole([x]), x)

        @run.vjp
        def _(x: mx.array, cotangent: mx.array, _output: mx.array) -> mx.array:
            whole = self.whole([cotangent])
            _, (slope,) = mx.vjp(lambda x: product_with(whole, x), [x], [cotangent])
            return slope

        return cast(Callable[[mx.array], mx.array], run)(x)

    def looked_up(self, index: mx.array) -> mx.array:
        """Return rows, unpacked, by the cheaper of two ways to communicate.

        Either the processes exchange the indices, and add the rows that each has of
        all, or they gather the weight. No gradient flows through the result.

        Args:
            index: Rows to return, of the same shape in every process.

        Returns:
            Rows, shape ``(*index.shape, in)``.
        """
        if self.bytes_of_rows(index.size) > self.bytes_of_whole:
            return looked_up_in(self.whole([index]), index)
        own = self.own
        (own_index,) = _in_turn([index.reshape(1, -1)])
        every = mx.distributed.all_gather(own_index, group=self.group)
        here = (every >= own.start) & (every < own.stop)
        rows = looked_up_in(self.part, mx.where(here, every - own.start, 0))
        rows = mx.where(here[..., None], rows, mx.array(0, rows.dtype))
        summed = mx.distributed.all_sum(rows, group=self.group)
        _end_turn(summed)
        mine = summed[self.group.rank()]
        return mx.stop_gradient(mine.reshape(*index.shape, -1))

    @property
    def bytes_of_whole(self) -> int:
        """Bytes that a process sends to gather the weight."""
        size = self.group.size()
        held = sum(array.nbytes for array in _arrays_of(self.part).values())
        return gather_bytes(held * size, size)

    def bytes_of_rows(self, count: int) -> int:
        """Bytes that a process sends to look up `count` rows by exchange."""
        size = self.group.size()
        wide = looked_up_in(self.part, mx.array([0])).dtype.size
        tokens = gather_bytes(4 * count * size, size)
        return tokens + sum_bytes(size * count * self.shape[1] * wide, size)


def _arrays_of(part: Part) -> dict[str, mx.array]:
    return part.parts if isinstance(part, QuantizedWeight) else {"weight": part}


def gather_rows(
    arrays: Sequence[mx.array], group: mx.distributed.Group
) -> list[mx.array]:
    """Gather matrices with the same number of rows, bit for bit.

    Each is a message of its own, which waits for the one before. A message of all of
    them would have to be taken apart again, so that the whole weight existed twice.

    Args:
        arrays: This process's rows. Shapes ``(rows, ...)``, any dtypes.
        group: The processes.

    Returns:
        The rows of all processes. Shapes ``(rows * processes, ...)``.
    """
    gathered: list[mx.array] = []
    for array in arrays:
        (own,) = mx.depends([array], gathered[-1:]) if gathered else [array]
        gathered.append(mx.distributed.all_gather(own, group=group))
    return gathered


def gather_columns(
    arrays: Sequence[mx.array], group: mx.distributed.Group
) -> list[mx.array]:
    """Gather matrices whose columns are divided, each in a message, bit for bit.

    Args:
        arrays: This process's columns. Shapes ``(rows, columns)``, any dtypes.
        group: The processes.

    Returns:
        The columns of all processes. Shapes ``(rows, columns * processes)``.
    """
    gathered = [mx.distributed.all_gather(a[None], group=group) for a in arrays]
    return [every.swapaxes(0, 1).flatten(1) for every in gathered]


def own_rows(rows: int, group: mx.distributed.Group) -> slice:
    """Return the rows that a process holds of `rows`, which the processes divide."""
    each = rows // group.size()
    return slice(group.rank() * each, (group.rank() + 1) * each)


def product_with(whole: Part, x: mx.array) -> mx.array:
    r"""Return :math:`x W^\top` for a gathered weight."""
    if isinstance(whole, QuantizedWeight):
        return whole.matmul(x)
    return x @ whole.T


def looked_up_in(whole: Part, index: mx.array) -> mx.array:
    """Return rows of a gathered weight, unpacked. Shape ``(*index.shape, in)``."""
    if isinstance(whole, QuantizedWeight):
        return whole.rows(index).dequantize()
    return whole[index]


def gather_bytes(size: int, processes: int) -> int:
    """Bytes that each process of a ring sends so that all have a gathered array.

    Args:
        size: Bytes of the gathered array.
        processes: Number of processes.
    """
    return size * (processes - 1) // processes


def sum_bytes(size: int, processes: int) -> int:
    """Bytes that each process of a ring sends to sum an array of `size` bytes."""
    return 2 * size * (processes - 1) // processes
