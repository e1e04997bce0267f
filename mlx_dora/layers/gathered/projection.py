"""The product with one matrix, and the part of Eq. 5 that differs between rows."""

from typing import Any

import mlx.core as mx

from mlx_dora.kernels.plain import compose
from mlx_dora.layers.gathered.layer import GatheredLayer
from mlx_dora.layers.gathered.rows import Plan


def adapted(layer: GatheredLayer, y: mx.array, x: mx.array) -> mx.array:
    """Adapt the base's output for every row.

    One token a row: the factors of all adapters of the batch stand side by side, so
    that two products serve every row, and each row keeps its own columns. This reads
    each factor once and needs no padding to a common rank. Several tokens a row: rows
    are grouped by adapter.

    Args:
        layer: The layer.
        y: Output of its base. Shape ``(tokens, out)``.
        x: Its input. Shape ``(tokens, in)``.
    """
    plan = layer.rows.plan
    if layer.is_plain(plan):
        return y
    length = layer.rows.rows_of(len(y), layer.path)
    if length == 1 and len(plan.groups) > 1:
        return _joined(layer, y, x, plan)
    outputs = []
    for key, rows in plan.groups:
        rest = _epilogue(layer, key, x.dtype)
        if len(plan.groups) == 1:
            return y if rest is None else rest.apply(y, x)
        own_y, own_x = _of_rows(y, rows, length), _of_rows(x, rows, length)
        outputs.append(own_y if rest is None else rest.apply(own_y, own_x))
    return _of_rows(mx.concatenate(outputs), plan.inverse, length)


def _joined(layer: GatheredLayer, y: mx.array, x: mx.array, plan: Plan) -> mx.array:
    down, up, widths = _factors(layer, plan, x.dtype)
    h = x @ down
    if (mask := plan.mask(widths)) is not None:
        h = mx.where(mask, h, 0)  # a product would let another row's inf through
    gain, offset = _gains(layer, plan, x.dtype)
    return compose(y, h, up, gain, offset)


def _factors(
    layer: GatheredLayer, plan: Plan, dtype: mx.Dtype
) -> tuple[mx.array, mx.array, tuple[int, ...]]:
    """Return A ``(in, Σr)``, s·B ``(Σr, out)`` and the ranks of the mix."""
    name = (layer.path, dtype)
    if name not in plan.mix.joined:
        parts = [_epilogue(layer, key, dtype) for key in plan.mix.keys]
        widths = tuple(0 if part is None else part.up.shape[0] for part in parts)
        held = [part for part in parts if part is not None]
        down = mx.concatenate([part.lora_a for part in held], axis=1)
        up = mx.concatenate([part.up for part in held])
        mx.eval(down, up)
        plan.mix.joined[name] = down, up, widths
    return plan.mix.joined[name]


def _gains(
    layer: GatheredLayer, plan: Plan, dtype: mx.Dtype
) -> tuple[mx.array, mx.array | None]:
    """Return g and (1 − g)∘b of each row: ``(rows, out)``, float32."""
    name = (layer.path, dtype)
    if name not in plan.derived:
        parts = [_epilogue(layer, key, dtype) for key in plan.keys]
        out = next(part.gain for part in parts if part is not None)
        one, zero = mx.ones_like(out), mx.zeros_like(out)
        gain = mx.stack([one if part is None else part.gain for part in parts])
        offset = None
        if "bias" in layer.base:
            offset = mx.stack([zero if p is None else p.offset for p in parts])
        mx.eval(gain, offset)
        plan.derived[name] = gain, offset
    return plan.derived[name]


def _epilogue(layer: GatheredLayer, key: int, dtype: mx.Dtype) -> Any:
    adapter = layer.adapters.get(key)
    return None if adapter is None else adapter.epilogue(dtype)


def _of_rows(values: mx.array, rows: mx.array, length: int) -> mx.array:
    """Return the tokens of these rows from ``(rows · length, n)``."""
    width = values.shape[-1]
    return values.reshape(-1, length, width)[rows].reshape(-1, width)
