"""Experts with an adapter for each row of the batch."""

from typing import TYPE_CHECKING, Any, ClassVar

import mlx.core as mx
import mlx.nn as nn

from mlx_dora.errors import DoRAError
from mlx_dora.layers.gathered.layer import GatheredLayer
from mlx_dora.layers.gathered.rows import BatchRows, Plan

if TYPE_CHECKING:
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear


class GatheredSwitchLinear(GatheredLayer):
    """`SwitchLinear` or `QuantizedSwitchLinear` with an adapter for each row.

    The factors of all adapters and experts form one stack, padded to the largest rank;
    a token's place in it is its adapter's number times the experts plus its expert.

    Attributes:
        linear: The frozen base.
    """

    base_name: ClassVar[str] = "linear"
    linear: "SwitchLinear | QuantizedSwitchLinear"

    def __call__(
        self, x: mx.array, indices: mx.array, sorted_indices: bool = False
    ) -> mx.array:
        """Return the output of the selected experts, in the base's layout.

        Args:
            x: Input, shape ``(..., 1, in)``, broadcast against `indices`.
            indices: Expert indices, shape ``(..., k)``, or ``(n,)`` sorted.
            sorted_indices: Whether the indices are in order, which is faster.
        """
        y = self.linear(x, indices, sorted_indices=sorted_indices)
        plan = self.rows.plan
        if self.is_plain(plan):
            return y
        a, b, gain, offset = self._stack(plan)
        place = self._numbers(plan, indices) * self.linear.num_experts + indices
        # On the CPU, MLX's gathered product supports only float32.
        on_cpu = mx.default_device().type == mx.DeviceType.cpu
        dtype = mx.float32 if on_cpu else x.dtype
        h = mx.gather_mm(x.astype(dtype), a.astype(dtype), rhs_indices=place)
        update = mx.gather_mm(h.astype(mx.float32), b, rhs_indices=place)
        adapted = gain[place][..., None, :] * (y.astype(mx.float32) + update)
        if offset is not None:
            adapted = adapted + offset[place][..., None, :]
        return adapted.astype(y.dtype)

    def _numbers(self, plan: Plan, indices: mx.array) -> mx.array:
        """Return each token's number in the stack, broadcast against `indices`."""
        held = [key for key in plan.mix.keys if key in self.adapters]
        numbers = [held.index(k) + 1 if k in held else 0 for k in plan.keys]
        if len(set(numbers)) == 1:
            return mx.array(numbers[0], dtype=indices.dtype)
        per_row = mx.array(numbers, dtype=indices.dtype)
        if indices.ndim == 1:  # the container has sorted the tokens by expert
            return self.rows.sorted_values(per_row, self.path)
        length = self.rows.rows_of(indices.size // indices.shape[-1], self.path)
        return mx.repeat(per_row, length).reshape(*indices.shape[:-1], 1)

    def _stack(
        self, plan: Plan
    ) -> tuple[mx.array, mx.array, mx.array, mx.array | None]:
        """Return A, s·B, g and (1 − g)∘b of the base and the mix's adapters."""
        if self.path not in plan.mix.joined:
            layers = [self.adapters[k] for k in plan.mix.keys if k in self.adapters]
            factors = [layer.factors() for layer in layers]
            rank = max(a.shape[-1] for a, _ in factors)
            all_a = [_padded(a, -1, rank) for a, _ in factors]
            all_b = [
                _padded(layer.scale * b.astype(mx.float32), -2, rank)
                for layer, (_, b) in zip(layers, factors, strict=True)
            ]
            gains = [layer.gain() for layer in layers]
            a, b, gain = (
                mx.concatenate([first, *values])
                for first, values in (
                    (mx.zeros_like(all_a[0]), all_a),
                    (mx.zeros_like(all_b[0]), all_b),
                    (mx.ones_like(gains[0]), gains),
                )
            )
            offset = None
            if "bias" in self.linear:
                bias = mx.tile(
                    self.linear["bias"].astype(mx.float32), (len(layers) + 1, 1)
                )
                offset = (1 - gain) * bias
            mx.eval(a, b, gain, offset)
            plan.mix.joined[self.path] = a, b, gain, offset
        return plan.mix.joined[self.path]


def _padded(factor: mx.array, axis: int, rank: int) -> mx.array:
    widths = [(0, 0)] * factor.ndim
    widths[axis] = (0, rank - factor.shape[axis])
    return mx.pad(factor, widths)


def watch_sorting(container: nn.Module, rows: BatchRows) -> None:
    """Let a container of experts tell its gathered layers how it sorts tokens.

    mlx-lm's `SwitchGLU` and `SwitchMLP` sort many tokens by expert before they call
    their layers, which then see neither rows nor their order. The container's class is
    replaced by a subclass whose call notes the order first.

    Raises:
        DoRAError: If the container is of another class.
    """
    from mlx_lm.models.switch_layers import SwitchGLU, SwitchMLP

    kind = type(container)
    if kind.__name__.startswith("Watched"):
        return
    if not isinstance(container, SwitchGLU | SwitchMLP):
        raise DoRAError(
            f"{kind.__module__}.{kind.__name__} calls its experts in a way that rows "
            "with different adapters cannot share; serve this adapter alone "
            "(--adapter-path)."
        )

    def call(self: Any, x: mx.array, indices: mx.array) -> mx.array:
        rows.note_order(indices)
        return kind.__call__(self, x, indices)

    watched = type(f"Watched{kind.__name__}", (kind,), {"__call__": call})
    object.__setattr__(container, "__class__", watched)
