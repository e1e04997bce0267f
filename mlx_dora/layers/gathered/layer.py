"""The base class of layers that take another adapter for each row of a batch."""

from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn

from mlx_dora.layers._layer import DoRALayer, read_directly
from mlx_dora.layers.gathered.rows import BatchRows, Plan


class GatheredLayer(nn.Module):
    r"""Abstract base class: a frozen base beside any number of its DoRA layers.

    .. math:: y_t = g_i \circ (W_0 x_t + s_i B_i(A_i x_t)) + b, \qquad i = i(t)

    This is Eq. 5 of DoRA (arXiv:2402.09353) with an adapter i for each row t of the
    batch. A LoRA adapter has g = 1, and a row without an adapter also has A = 0. The
    product with W0 is shared by all rows. Each adapter is an ordinary DoRA layer over
    the same base, in eval mode.

    Attributes:
        path: The layer's path in the model, for messages.
        rows: The adapter of each row of the batch.
        adapters: The adapters' layers by key.
    """

    base_name: ClassVar[str]
    path: str

    def __init__(self, base: nn.Module, rows: BatchRows, path: str) -> None:
        super().__init__()
        self[self.base_name] = base
        self.path = path
        # Attributes, not parameters or children.
        object.__setattr__(self, "rows", rows)
        object.__setattr__(self, "adapters", {})

    rows: BatchRows
    adapters: dict[int, Any]

    @property
    def base(self) -> nn.Module:
        """The frozen module that all adapters share."""
        return self[self.base_name]

    @property
    def weight(self) -> mx.array:
        """Always raises: reading the base weight directly would bypass the adapters."""
        raise read_directly(self.path)

    def put(self, key: int, layer: DoRALayer) -> None:
        """Add an adapter: a DoRA layer over this layer's base, in eval mode."""
        self.adapters[key] = layer

    def drop(self, key: int) -> None:
        """Remove an adapter."""
        self.adapters.pop(key, None)

    def is_plain(self, plan: Plan) -> bool:
        """Return whether no row of the batch uses an adapter of this layer."""
        return not any(key in self.adapters for key in plan.keys)
