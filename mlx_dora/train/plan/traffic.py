"""Calculates what the processes of a training send, from the shapes of the model.

All numbers are for one process of a ring, per batch. They are calculated from the sizes
of messages; what a network makes of them is not predicted.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import mlx.nn as nn

from mlx_dora.adapters.keys import blocks, takes_lora
from mlx_dora.errors import DoRAError
from mlx_dora.io.header import TensorInfo
from mlx_dora.layers.sharded import SHARDABLE
from mlx_dora.matrix.sharded import gather_bytes, sum_bytes

RATES = (10, 40, 80)
"""Rates of links, in gigabits per second, for which a plan says the time."""

_ARRAYS = ("weight", "scales", "biases")
# Projections in the order of computation; the first read the block's input.
_STAGES = {
    "q_proj": 0,
    "k_proj": 0,
    "v_proj": 0,
    "qkv_proj": 0,
    "o_proj": 1,
    "gate_proj": 2,
    "up_proj": 2,
    "gate_up_proj": 2,
    "down_proj": 3,
}


@dataclass(frozen=True, kw_only=True)
class DividedModule:
    """A linear layer or an embedding of a model to be divided.

    Args:
        path: Path of the module.
        rows: Number of rows.
        width: Number of columns.
        nbytes: Bytes of its weight, as stored.
        row_bytes: Bytes of an unpacked row.
        arrays: Number of arrays of its weight: three if it is packed.
        block: Index of its block; None outside the blocks.
        is_embedding: Whether tokens are looked up in it.
        is_head: Whether logits are computed with it.
        is_adapted: Whether it has an adapter.
        axis: With tensor parallelism, the divided axis; None if it stays whole.
        rank: With tensor parallelism, rank of its adapter.
    """

    path: str
    rows: int
    width: int
    nbytes: int
    row_bytes: int
    arrays: int
    block: int | None
    is_embedding: bool
    is_head: bool
    is_adapted: bool
    axis: int | None = None
    rank: int = 0

    @property
    def stage(self) -> int:
        """Place in its block: 0 for modules that read the block's input."""
        return _STAGES.get(self.path.rpartition(".")[2], 1)


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes that a process sends per batch.

    Args:
        weights: To gather divided weights.
        tokens: To look up the embeddings of the tokens.
        activations: To sum activations and their gradients (tensor parallelism).
        norms: To share the norms of adapted rows, once per update.
        gradients: To sum the gradients, once per update.
        messages: Number of messages that every process waits for, without sums of a
            few numbers.
        seconds: Least time of the transfers by the rate of the link, in Gb/s.
    """

    weights: int = 0
    tokens: int = 0
    activations: int = 0
    norms: int = 0
    gradients: int = 0
    messages: int = 0
    seconds: dict[str, float] = field(init=False)

    def __post_init__(self) -> None:
        bits = 8 * self.total
        times = {f"{rate}": bits / (rate * 1e9) for rate in RATES}
        object.__setattr__(self, "seconds", times)

    @property
    def total(self) -> int:
        """All bytes that a process sends per batch."""
        shared = self.weights + self.tokens + self.activations
        return shared + self.norms + self.gradients


def read_modules(
    empty: nn.Module,
    infos: Mapping[str, TensorInfo],
    adapted: Sequence[str],
    element_bytes: int,
) -> tuple[DividedModule, ...]:
    """List a model's linear layers and embeddings.

    Args:
        empty: The model, without weights.
        infos: Headers of the stored tensors by name.
        adapted: Paths of the modules with adapters.
        element_bytes: Bytes per element of an unpacked weight.

    Raises:
        DoRAError: If the model has experts, or stores tensors by other names.
    """
    names = [path for path, _ in blocks(empty)]
    leaves = [(p, m) for p, m in empty.named_modules() if takes_lora(m)]
    unknown = [p for p, m in leaves if not isinstance(m, SHARDABLE)]
    unknown += [p for p, _ in leaves if f"{p}.weight" not in infos]
    if unknown:
        raise DoRAError(
            f"no plan with shard: {unknown[0]} of this model cannot be divided, or is "
            "stored by another name."
        )
    has_head = any(path.endswith("lm_head") for path, _ in leaves)
    modules = []
    for path, module in leaves:
        arrays = [infos[n] for a in _ARRAYS if (n := f"{path}.{a}") in infos]
        is_embedding = isinstance(module, nn.Embedding | nn.QuantizedEmbedding)
        rows, width = module["weight"].shape
        block = next((i for i, n in enumerate(names) if path.startswith(f"{n}.")), None)
        modules.append(
            DividedModule(
                path=path,
                rows=rows,
                width=width,
                nbytes=sum(info.nbytes for info in arrays),
                row_bytes=width * element_bytes,
                arrays=len(arrays),
                block=block,
                is_embedding=is_embedding,
                is_head=block is None and (not has_head or not is_embedding),
                is_adapted=path in adapted,
            )
        )
    return tuple(modules)


def divided_by(modules: Sequence[DividedModule], processes: int) -> list[DividedModule]:
    """Return the modules whose rows some processes can divide."""
    return [module for module in modules if module.rows % processes == 0]


def traffic_of(
    modules: Sequence[DividedModule],
    *,
    processes: int,
    tokens: int,
    trainable: int,
    has_norms: bool,
    grad_checkpoint: bool,
    accumulation: int,
) -> Traffic:
    """Calculate the traffic of a training with divided weights.

    Args:
        modules: From `read_modules`; empty if no weight is divided.
        processes: Number of processes.
        tokens: Input tokens of a process's batch, padding included.
        trainable: Number of trainable parameters.
        has_norms: Whether the adapters are DoRA's.
        grad_checkpoint: Whether blocks are recomputed.
        accumulation: Number of batches per update.
    """
    first = first_trained(modules)
    weights = looked_up = norms = messages = 0
    for module in divided_by(modules, processes):
        gather = gather_bytes(module.nbytes, processes)
        times = 0
        if module.block is not None:
            times = _times_gathered(module, first, grad_checkpoint)
        elif module.is_head:
            times = 1  # held for all chunks, backward included
        weights += times * gather
        messages += times * module.arrays
        if module.is_embedding:
            # Every process sends its tokens, and adds the rows that it has of all.
            exchange = gather_bytes(4 * tokens * processes, processes)
            exchange += sum_bytes(processes * tokens * module.row_bytes, processes)
            looked_up += min(exchange, gather)
            messages += 2 if exchange <= gather else module.arrays
        if module.is_adapted and has_norms:
            norms += gather_bytes(4 * module.rows, processes)
    return Traffic(
        weights=weights,
        tokens=looked_up,
        norms=norms // accumulation,
        gradients=sum_bytes(4 * trainable, processes) // accumulation,
        messages=messages,
    )


def first_trained(modules: Sequence[DividedModule]) -> tuple[int, int]:
    """Block and stage from which on gradients pass through the model."""
    adapted = [module for module in modules if module.is_adapted]
    if any(m.is_embedding and not m.is_head for m in adapted):
        return -1, 0
    # A tied head is also the embedding, through which gradients reach every block.
    if any(m.is_embedding for m in adapted):
        return -1, 0
    places = [(m.block, m.stage) for m in adapted if m.block is not None]
    return min(places, default=(1 << 30, 0))


def _times_gathered(
    module: DividedModule,
    first: tuple[int, int],
    grad_checkpoint: bool,
) -> int:
    """How often a module's weight is gathered for a batch."""
    assert module.block is not None
    is_traced = (module.block, module.stage) > first
    times = 1 + is_traced
    return times + (grad_checkpoint and module.block >= first[0])
