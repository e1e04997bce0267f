"""An adapter's part in a module, matrix by matrix: of a stack, one an expert or head.

Where a matrix ``(out, in)`` is wanted, the layouts of embeddings and stacks end here.
"""

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from mlx_dora.adapters.adapter import Adapter, rank_of
from mlx_dora.adapters.format import pad_rank
from mlx_dora.layers import weight_of
from mlx_dora.layers.layout import layout_of
from mlx_dora.matrix.low_rank import Adapted, LowRank
from mlx_dora.matrix.weight import Weight, matrices


def named_matrices(path: str, weight: Weight) -> list[tuple[str, Weight]]:
    """A module's matrices by name: its path, of a stack with an index, ``path[3]``."""
    found = matrices(weight)
    if len(weight.shape) == 2:
        return [(path, found[0])]
    return [(f"{path}[{i}]", one) for i, one in enumerate(found)]


def adapted_matrices(adapter: Adapter, path: str, module: nn.Module) -> list[Adapted]:
    """What an adapter does to each of them, A ``(in, r)`` and B ``(r, out)``.

    Where it does not have the module, updates of rank 0: the base's rows as they are.
    """
    lora_a = adapter.tensors.get(f"{path}.lora_a")
    if lora_a is None:
        *stack, rows, width = weight_of(module).shape
        update = LowRank(
            lora_a=mx.zeros((*stack, width, 0)),
            lora_b=mx.zeros((*stack, 0, rows)),
            scale=0.0,
        )
        return Adapted(update=update, m=None).matrices()
    lora_b = adapter.tensors[f"{path}.lora_b"]
    a, b = layout_of(module, lora_a).turn(
        lora_a.astype(mx.float32), lora_b.astype(mx.float32)
    )
    update = LowRank(lora_a=a, lora_b=b, scale=adapter.config.scale_of(path))
    m = adapter.tensors.get(f"{path}.m")
    return Adapted(
        update=update, m=None if m is None else m.astype(mx.float32)
    ).matrices()


def adapter_tensors(
    path: str, module: nn.Module, weight: Weight, parts: Sequence[dict[str, mx.array]]
) -> dict[str, mx.array]:
    """The opposite of `adapted_matrices`: tensors of an adapter of the module.

    Args:
        path: Path of the module.
        module: The module.
        weight: Its weight, of which the shape counts.
        parts: Of each matrix, ``lora_a`` ``(in, r)``, ``lora_b`` ``(r, out)`` and, for
            DoRA, ``m`` ``(out,)``. Ranks in a stack may differ: zeros fill them up.

    Returns:
        The tensors, evaluated.
    """
    if len(weight.shape) == 2:
        (values,) = parts
    else:
        rank = max(rank_of("lora_a", one["lora_a"]) for one in parts)
        values = {
            leaf: mx.stack([pad_rank(leaf, one[leaf], rank) for one in parts])
            for leaf in parts[0]
        }
    lora_a, lora_b = values["lora_a"], values["lora_b"]
    lora_a, lora_b = layout_of(module, lora_a).turn(lora_a, lora_b)
    values = values | {"lora_a": lora_a, "lora_b": lora_b}
    mx.eval(values)
    return {f"{path}.{leaf}": value for leaf, value in values.items()}
