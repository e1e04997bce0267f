"""The terms of the memory of one training step."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from mlx_dora.evaluate.cross_entropy import chunk_size
from mlx_dora.train.config import TrainConfig
from mlx_dora.train.plan.attention import BLOCK, Device, count_scored
from mlx_dora.train.plan.shapes import ModelShapes
from mlx_dora.train.plan.tensor import tensor_traffic
from mlx_dora.train.plan.traffic import (
    DividedModule,
    Traffic,
    divided_by,
    traffic_of,
)

# Number of arrays of a chunk's size, or of a block's width, that exist at a time: MLX
# allocates up to ten tasks ahead of the computation. See docs/memory.md.
_IN_FLIGHT = 10
_BLOCK_IN_FLIGHT = 8
_RECOMPUTED_IN_FLIGHT = 12
# Score arrays in flight in a block's backward pass, besides those it kept.
_SCORES_IN_FLIGHT = 2
# Arrays of a block of scores in a fused backward pass: scores and their gradient.
_FUSED_IN_FLIGHT = 2
# Gathered weights of a block that exist at a time, where processes divide them.
_GATHERS_IN_FLIGHT = 2
# Copies of the trained parameters that an optimizer keeps.
_OPTIMIZER_COPIES = {"adam": 2, "adamw": 2, "muon": 1, "sgd": 1, "adafactor": 1}


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Predicted peak memory of a training step, in bytes.

    Args:
        batch_size: Rows per batch.
        length: Width of the batch that the longest rows fill, in tokens: rows are
            padded to a common width.
        rows: Number of rows of the data; None if no data was read.
        longest_row: Tokens of the data's longest row, after cutting; None if no data
            was read.
        packed: Whether short rows are joined into rows of `length` tokens.
        grad_checkpoint: Whether blocks are recomputed.
        weights: Bytes of the model as stored.
        rows_per_unit: Rows for each row of ``batch_size``: 2 for pairs.
        reference: Bytes of an objective's reference beside the model.
        adapter: Bytes of the trained parameters, in float32 (in full training, a part
            of the weights).
        optimizer: Bytes of the optimizer's state.
        gradients: Bytes of the gradients.
        activations: Bytes of activations kept for the backward pass or in flight there,
            without attention scores.
        scores: Bytes of attention scores, kept and in flight: whole arrays in
            `scored_blocks`, and blocks of them in the fused backward pass elsewhere.
        scored_blocks: Trained blocks whose attention keeps an array of its scores: all
            on the CPU; on an Apple GPU those that MLX has no fused backward pass for.
        device: Backend of MLX that the plan is for: cpu, metal or cuda.
        logits: Bytes of the chunks of logits in flight.
        gathered: Bytes of the largest weight that is gathered whole; 0 unless weights
            are divided among processes.
        processes: Number of processes; all numbers are for one of them.
        traffic: Bytes that a process sends per batch; None for one process.
        peak: Predicted peak. Activations and logits do not peak together.
        limit: Bytes that MLX may use on this machine.
        longest: Longest rows that fit at this batch size, in tokens; 0 for none.
        largest_batch: Largest batch that fits at this length, in rows; 0 for none.
        advice: Flags that would make the training fit, least costly first.
    """

    batch_size: int
    length: int
    rows: int | None = None
    longest_row: int | None = None
    packed: bool = False
    grad_checkpoint: bool
    weights: int
    adapter: int
    optimizer: int
    gradients: int
    activations: int
    scores: int
    scored_blocks: int
    device: str
    logits: int
    gathered: int = 0
    processes: int = 1
    traffic: Traffic | None = None
    peak: int
    limit: int
    reference: int = 0
    rows_per_unit: int = 1
    longest: int = 0
    largest_batch: int = 0
    advice: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether the peak is within the limit."""
        return self.peak <= self.limit


def plan_step(
    shapes: ModelShapes,
    train: TrainConfig,
    limit: int,
    device: Device,
    document: int | None = None,
    processes: int = 1,
) -> MemoryPlan:
    """The terms and the peak, without the largest sizes that fit.

    Args:
        shapes: Sizes of the model.
        train: Settings of the training, whose batches have ``batch_size`` rows of
            ``max_seq_length`` tokens.
        limit: Bytes to fit into.
        device: Where to train.
        document: Tokens of the longest document in packed rows.
        processes: Number of processes that share a batch.
    """
    length, rows = train.max_seq_length, train.batch_size
    if train.shard != "tensor":
        train = replace(train, batch_size=-(-rows // processes))
    tokens = train.batch_size * shapes.rows_per_unit * (length - 1)
    size = shapes.element_bytes
    # 1. Held throughout the step.
    is_full = train.fine_tune_type == "full"
    trained = shapes.trainable * (size if is_full else 4)
    optimizer = trained * _OPTIMIZER_COPIES[train.optimizer]
    gradients = trained + 4 * shapes.trainable * (train.grad_accumulation_steps > 1)
    reference = shapes.held(trained)
    divided, gathered = _divided(shapes, train, processes)
    away = sum(m.nbytes * (processes - 1) // processes for m in divided)
    in_blocks = [m.nbytes for m in gathered if m.block is not None]
    heads = [m.nbytes for m in gathered if m.is_head]
    weights = shapes.weight_bytes - away
    always = weights + (0 if is_full else trained) + optimizer + gradients
    always += reference
    # 2. Kept by the forward pass.
    count = len(shapes.block_elements)
    scored, score, blocks = _scores(shapes, train, device, document)
    stream = tokens * shapes.hidden * size
    block = tokens * max(shapes.block_elements, default=0) * size
    widest = tokens * shapes.block_width * size
    if train.grad_checkpoint:
        kept, kept_scores = count * stream, 0
        working = block + _RECOMPUTED_IN_FLIGHT * widest
        working_scores = (1 + _SCORES_IN_FLIGHT) * (scored > 0)
    else:
        kept, kept_scores = tokens * sum(shapes.block_elements) * size, scored
        working = _BLOCK_IN_FLIGHT * widest
        working_scores = _SCORES_IN_FLIGHT * (scored > 0)
    # 3. In flight: in the head, or in a block's backward pass.
    logits = _logits(shapes, train, tokens, device)
    # A divided weight is whole while it is used: the head's for all chunks.
    logits += max(heads, default=0)
    gathers = _GATHERS_IN_FLIGHT * max(in_blocks, default=0)
    backward = working + working_scores * score + blocks + gathers
    return MemoryPlan(
        batch_size=rows,
        length=length,
        grad_checkpoint=train.grad_checkpoint,
        weights=weights,
        adapter=trained,
        optimizer=optimizer,
        gradients=gradients,
        activations=kept + working,
        scores=(kept_scores + working_scores) * score + blocks,
        scored_blocks=scored,
        device=device.kind,
        logits=logits,
        gathered=max([*heads, *in_blocks], default=0),
        processes=processes,
        traffic=_traffic(shapes, train, tokens, processes),
        peak=always + kept + kept_scores * score + max(logits, backward),
        limit=limit,
        reference=reference,
        rows_per_unit=shapes.rows_per_unit,
    )


def _divided(
    shapes: ModelShapes, train: TrainConfig, processes: int
) -> tuple[Sequence[DividedModule], Sequence[DividedModule]]:
    """Modules whose weights the processes divide, and those gathered to be used."""
    if train.shard == "tensor":
        return [module for module in shapes.modules if module.axis is not None], []
    divided = divided_by(shapes.modules, processes)
    return divided, divided


def _logits(
    shapes: ModelShapes, train: TrainConfig, tokens: int, device: Device
) -> int:
    """Bytes of the chunks of logits in flight, for a batch of this many tokens.

    Only targets need logits, but in a compiled step the mask has no values, so that
    the head runs on all tokens. Commands on a Linux CPU do not compile.
    """
    is_compiled = "MLX_DISABLE_COMPILE" not in os.environ and not train.packing
    if device.kind == "cpu" and not is_compiled:
        tokens = math.ceil(shapes.target_share * tokens)
    chunk = min(tokens, chunk_size(shapes.vocabulary))
    chunks = min(_IN_FLIGHT, 3 * -(-tokens // max(chunk, 1)))
    size = 4 if device.kind == "cpu" else shapes.element_bytes
    return chunks * chunk * shapes.vocabulary * size


def _traffic(
    shapes: ModelShapes, train: TrainConfig, tokens: int, processes: int
) -> Traffic | None:
    """What each process sends in a step of this many tokens; None for one process."""
    if processes == 1:
        return None
    calculate = traffic_of
    if train.shard == "tensor":
        calculate = partial(tensor_traffic, element_bytes=shapes.element_bytes)
    return calculate(
        shapes.modules,
        processes=processes,
        tokens=tokens,
        trainable=shapes.trainable,
        has_norms=train.fine_tune_type == "dora",
        grad_checkpoint=train.grad_checkpoint,
        accumulation=train.grad_accumulation_steps,
    )


def _scores(
    shapes: ModelShapes, train: TrainConfig, device: Device, document: int | None
) -> tuple[int, int, int]:
    """Blocks that keep their scores, bytes of those of one, and of fused blocks."""
    inputs = train.max_seq_length - 1
    rows = train.batch_size * shapes.rows_per_unit
    per_head = rows * shapes.heads * shapes.element_bytes
    calls = shapes.attention(inputs)
    trained = len(shapes.block_elements)
    scored = count_scored(calls, shapes.blocks, trained, device)
    longest = inputs
    if document is not None and len(calls) == shapes.blocks:
        longest = min(document, inputs)  # each document has a call of its own
    whole, rest = divmod(inputs, longest)
    score = per_head * (whole * longest**2 + rest**2)
    fused = 0
    if scored < trained:
        fused = _FUSED_IN_FLIGHT * per_head * min(longest, BLOCK) ** 2
    return scored, score, fused
