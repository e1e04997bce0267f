"""Splits a module's adapter into matrices; a stack has one per expert or head.

Converts the layouts of embeddings and stacks to matrices of shape ``(out, in)``.
"""

from collections.abc import Mapping, Sequence

import mlx.core as mx
import mlx.nn as nn

from mlx_dora.adapters.adapter import Adapter, rank_of
from mlx_dora.adapters.format import pad_rank
from mlx_dora.layers import weight_of
from mlx_dora.layers.layout import layout_of, rearranged
from mlx_dora.matrix.low_rank import Adapted, LowRank
from mlx_dora.matrix.weight import Weight, matrices


def named_matrices(path: str, weight: Weight) -> list[tuple[str, Weight]]:
    """Return a module's matrices by name: its path, or ``path[3]`` in a stack."""
    parts = matrices(weight)
    if len(weight.shape) == 2:
        return [(path, parts[0])]
    return [(f"{path}[{i}]", part) for i, part in enumerate(parts)]


def adapted_matrices(adapter: Adapter, path: str, module: nn.Module) -> list[Adapted]:
    """Return the adapted matrices of a single module; see `adapted_modules`."""
    return adapted_modules(adapter, {path: module})[path]


def adapted_modules(
    adapter: Adapter, modules: Mapping[str, nn.Module]
) -> dict[str, list[Adapted]]:
    """Return the adapted matrices of modules, by path.

    A has shape ``(in, r)`` and B ``(r, out)``. If the adapter does not have a
    module, the updates have rank 0.
    """
    adapted = {}
    for path, scale in adapter.config.scales_of(modules).items():
        lora_a = adapter.tensors.get(f"{path}.lora_a")
        m = adapter.tensors.get(f"{path}.m")
        if lora_a is None:
            *stack, rows, width = weight_of(modules[path]).shape
            a, b = mx.zeros((*stack, width, 0)), mx.zeros((*stack, 0, rows))
            scale = 0.0
        else:
            a, b = rearranged(
                layout_of(modules[path], lora_a.ndim - 2),
                lora_a.astype(mx.float32),
                adapter.tensors[f"{path}.lora_b"].astype(mx.float32),
            )
        update = LowRank(lora_a=a, lora_b=b, scale=scale)
        m = None if m is None else m.astype(mx.float32)
        adapted[path] = Adapted(update=update, m=m).matrices()
    return adapted


def adapter_tensors(
    path: str, module: nn.Module, weight: Weight, parts: Sequence[dict[str, mx.array]]
) -> dict[str, mx.array]:
    """Return a module's adapter tensors; the inverse of `adapted_matrices`.

    Args:
        path: Path of the module.
        module: The module.
        weight: The module's weight, of which only the shape is used.
        parts: For each matrix, ``lora_a`` of shape ``(in, r)``, ``lora_b``
            ``(r, out)`` and, for DoRA, ``m`` ``(out,)``. Ranks in a stack may differ;
            they are padded with zeros.

    Returns:
        The tensors, evaluated.
    """
    if len(weight.shape) == 2:
        (values,) = parts
    else:
        rank = max(rank_of("lora_a", part["lora_a"]) for part in parts)
        values = {
            leaf: mx.stack([pad_rank(leaf, part[leaf], rank) for part in parts])
            for leaf in parts[0]
        }
    lora_a, lora_b = values["lora_a"], values["lora_b"]
    lora_a, lora_b = rearranged(layout_of(module, lora_a.ndim - 2), lora_a, lora_b)
    values = values | {"lora_a": lora_a, "lora_b": lora_b}
    mx.eval(values)
    return {f"{path}.{leaf}": value for leaf, value in values.items()}
