"""The base class of layers that take another adapter for each row of a batch."""

from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn

from mlx_dora.kernels.plain import compose
from mlx_dora.layers._layer import DoRALayer, read_directly
from mlx_dora.layers.gathered.rows import BASE, BatchRows, Plan


class GatheredLayer(nn.Module):
    r"""Abstract base class: a frozen base beside any number of its DoRA layers.

    .. math:: y_t = g_i \circ (W_0 x_t + s_i B_i(A_i x_t)) + b, \qquad i = i(t)

    This is Eq. 5 of DoRA (arXiv:2402.09353) with an adapter i for each row t of the
    batch. A LoRA adapter has g = 1, and a row without an adapter also has A = 0. The
    product with W0 is shared by all rows. Each adapter is an ordinary DoRA layer over
    the same base, in eval mode.

    Attributes:
        path: The layer's path in the model, for messages.
    """

    base_name: ClassVar[str]
    path: str

    def __init__(self, base: nn.Module, rows: BatchRows, path: str) -> None:
        super().__init__()
        self[self.base_name] = base
        self.path = path
        # Attributes, not parameters or children.
        object.__setattr__(self, "_rows", rows)
        object.__setattr__(self, "_layers", {})

    _rows: BatchRows
    _layers: dict[int, Any]

    @property
    def base(self) -> nn.Module:
        """The frozen module that all adapters share."""
        return self[self.base_name]

    @property
    def weight(self) -> mx.array:
        """Always raises: reading the base weight directly would bypass the adapters."""
        raise read_directly(self.path)

    @property
    def keys_held(self) -> tuple[int, ...]:
        """Keys of the adapters that adapt this layer."""
        return tuple(self._layers)

    def put(self, key: int, layer: DoRALayer) -> None:
        """Add an adapter: a DoRA layer over this layer's base, in eval mode."""
        self._layers[key] = layer

    def drop(self, key: int) -> None:
        """Remove an adapter."""
        self._layers.pop(key, None)

    def _is_plain(self, plan: Plan) -> bool:
        """Return whether no row of the batch uses an adapter of this layer."""
        return not any(key in self._layers for key in plan.mix.keys)


class GatheredProjection(GatheredLayer):
    """A gathered layer whose base multiplies by one matrix."""

    def _project(self, y: mx.array, x: mx.array) -> mx.array:
        """Adapt the base's output `y` ``(tokens, out)`` for the input `x`.

        One token a row: the factors of all adapters of the batch stand side by side, so
        that two products serve every row, and each row keeps its own columns. Several
        tokens a row: rows are grouped by adapter.
        """
        plan = self._rows.plan
        if self._is_plain(plan):
            return y
        length = self._rows.rows_of(len(y), self.path)
        if length == 1 and len(plan.groups) > 1:
            return self._joined(y, x, plan)
        outputs = []
        for key, rows in plan.groups:
            layer = self._layers.get(key)
            whole = len(plan.groups) == 1
            yk, xk = (v if whole else _of_rows(v, rows, length) for v in (y, x))
            rest = None if layer is None else layer.epilogue(x.dtype)
            outputs.append(yk if rest is None else rest.apply(yk, xk))
        if len(outputs) == 1:
            return outputs[0]
        return _of_rows(mx.concatenate(outputs), plan.inverse, length)

    def _joined(self, y: mx.array, x: mx.array, plan: Plan) -> mx.array:
        down, up, widths = self._factors(plan, x.dtype)
        h = x @ down
        if (mask := plan.mask(widths)) is not None:
            h = mx.where(mask, h, 0)  # an overflow of another adapter does not leak
        gain, offset = self._gains(plan, x.dtype)
        return compose(y, h, up, gain, offset)

    def _factors(
        self, plan: Plan, dtype: mx.Dtype
    ) -> tuple[mx.array, mx.array, tuple[int, ...]]:
        """Return A ``(in, Σr)``, s·B ``(Σr, out)`` and the ranks of the mix."""
        name = (self.path, dtype)
        if name not in plan.mix.joined:
            parts = [self._epilogue(key, dtype) for key in plan.mix.keys]
            widths = tuple(0 if p is None else p.up.shape[0] for p in parts)
            held = [p for p in parts if p is not None]
            down = mx.concatenate([p.lora_a for p in held], axis=1)
            up = mx.concatenate([p.up for p in held])
            mx.eval(down, up)
            plan.mix.joined[name] = down, up, widths
        return plan.mix.joined[name]

    def _gains(self, plan: Plan, dtype: mx.Dtype) -> tuple[mx.array, mx.array | None]:
        """Return g and (1 − g)∘b of each row: ``(rows, out)``, float32."""
        name = (self.path, dtype)
        if name not in plan.derived:
            parts = [self._epilogue(key, dtype) for key in plan.keys]
            out = next(p.gain for p in parts if p is not None)
            one, zero = mx.ones_like(out), mx.zeros_like(out)
            gain = mx.stack([one if p is None else p.gain for p in parts])
            offset = None
            if "bias" in self.base:
                offset = mx.stack([zero if p is None else p.offset for p in parts])
            mx.eval(gain, offset)
            plan.derived[name] = gain, offset
        return plan.derived[name]

    def _epilogue(self, key: int, dtype: mx.Dtype) -> Any:
        layer = None if key == BASE else self._layers.get(key)
        return None if layer is None else layer.epilogue(dtype)


def _of_rows(values: mx.array, rows: mx.array, length: int) -> mx.array:
    """Return the tokens of these rows from ``(rows · length, n)``."""
    width = values.shape[-1]
    return values.reshape(-1, length, width)[rows].reshape(-1, width)
