"""Predicts the memory of a training from the shapes of the model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx

from mlx_dora.adapters.config import DoRAConfig
from mlx_dora.data.config import DEFAULT_DATA
from mlx_dora.errors import DoRAError
from mlx_dora.evaluate.cross_entropy import chunk_size
from mlx_dora.train.config import TrainConfig
from mlx_dora.train.plan.rows import for_rows, row_lengths
from mlx_dora.train.plan.shapes import ModelShapes, read_shapes

# Number of arrays of a chunk's size, or of a block's width, that exist at a time: MLX
# allocates up to ten tasks ahead of the computation. See docs/memory.md.
_IN_FLIGHT = 10
_BLOCK_IN_FLIGHT = 8
_RECOMPUTED_IN_FLIGHT = 12
# Score arrays in flight in a block's backward pass, besides those it kept.
_SCORES_IN_FLIGHT = 2
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
        adapter: Bytes of the trained parameters, in float32 (in full training, a part
            of the weights).
        optimizer: Bytes of the optimizer's state.
        gradients: Bytes of the gradients.
        activations: Bytes of activations kept for the backward pass or in flight there,
            without attention scores.
        scores: Bytes of attention scores, kept and in flight. In training MLX
            materializes them on every device; Apple's fused attention runs only in
            validation.
        logits: Bytes of the chunks of logits in flight.
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
    logits: int
    peak: int
    limit: int
    longest: int = 0
    largest_batch: int = 0
    advice: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether the peak is within the limit."""
        return self.peak <= self.limit


def plan_memory(
    train: TrainConfig,
    dora: DoRAConfig,
    *,
    limit: int | None = None,
    lengths: Sequence[int] | None = None,
) -> MemoryPlan:
    """Predict the peak memory of a training, which its longest rows determine.

    Reads the config and the headers of the model's files, and the training data, but no
    weights. If no data is named, every row is taken to have the maximum length.

    Args:
        train: Settings of the training. Model, data, batch size, maximum length,
            optimizer, accumulation and checkpointing matter.
        dora: Settings of the adapter.
        limit: Bytes to fit into; default: this machine's limit.
        lengths: Tokens of each training row, instead of reading the data.

    Raises:
        DoRAError: If the model or the data does not exist, or the model has blocks
            other than attention and an MLP, or does not match `dora`.
    """
    if train.model is None:
        raise DoRAError("model is not given: name a folder or a Hugging Face id.")
    if not dora.is_plain:
        raise DoRAError(
            "no memory plan for variants, init pissa or magnitude_keys: only DoRA, "
            "LoRA and full fine-tuning have one."
        )
    shapes = read_shapes(Path(train.model), dora, train.fine_tune_type)
    if lengths is None and (train.data != DEFAULT_DATA or train.hf_dataset):
        lengths = row_lengths(train)
    step = train if lengths is None else for_rows(train, lengths)
    limit = memory_limit() if limit is None else limit
    plan = predict(shapes, step, limit)
    return replace(
        plan,
        rows=None if lengths is None else len(lengths),
        longest_row=min(max(lengths), train.max_seq_length) if lengths else None,
        packed=train.packing,
        advice=() if plan.fits else _advise(shapes, step, limit),
    )


def memory_limit() -> int:
    """Memory limit of this machine: an Apple GPU's working set, or MLX's limit."""
    info = mx.device_info()
    size = info.get("max_recommended_working_set_size") or info.get("memory_size")
    return min(int(size), mx.get_memory_limit()) if size else mx.get_memory_limit()


def predict(shapes: ModelShapes, train: TrainConfig, limit: int) -> MemoryPlan:
    """Make the plan of a training, without advice."""

    def fitting(change: Callable[[int], TrainConfig], most: int) -> int:
        least = 0
        while least < most:  # binary search for the largest that fits
            middle = (least + most + 1) // 2
            if plan_step(shapes, change(middle), limit).peak <= limit:
                least = middle
            else:
                most = middle - 1
        return least

    plan = plan_step(shapes, train, limit)
    longest = fitting(lambda n: replace(train, max_seq_length=8 * max(n, 1)), 1 << 17)
    rows = fitting(lambda n: replace(train, batch_size=max(n, 1)), 1 << 14)
    return replace(plan, longest=8 * longest, largest_batch=rows)


def plan_step(shapes: ModelShapes, train: TrainConfig, limit: int) -> MemoryPlan:
    """The terms and the peak, without the largest sizes that fit."""
    length = train.max_seq_length
    tokens = train.batch_size * (length - 1)
    size = shapes.element_bytes
    # 1. Held throughout the step.
    is_full = train.fine_tune_type == "full"
    trained = shapes.trainable * (size if is_full else 4)
    optimizer = trained * _OPTIMIZER_COPIES[train.optimizer]
    gradients = trained + 4 * shapes.trainable * (train.grad_accumulation_steps > 1)
    always = shapes.weight_bytes + (0 if is_full else trained) + optimizer + gradients
    # 2. Kept by the forward pass.
    score = train.batch_size * shapes.heads * (length - 1) ** 2 * size
    stream = tokens * shapes.hidden * size
    block = tokens * max(shapes.block_elements, default=0) * size
    count = len(shapes.block_elements)
    widest = tokens * shapes.block_width * size
    if train.grad_checkpoint:
        kept, kept_scores = count * stream, 0
        working = block + _RECOMPUTED_IN_FLIGHT * widest
        working_scores = 1 + _SCORES_IN_FLIGHT
    else:
        kept, kept_scores = tokens * sum(shapes.block_elements) * size, count
        working, working_scores = _BLOCK_IN_FLIGHT * widest, _SCORES_IN_FLIGHT
    # 3. In flight: in the head, or in a block's backward pass.
    chunk = min(tokens, chunk_size(shapes.vocabulary))
    chunks = min(_IN_FLIGHT, 3 * -(-tokens // chunk))
    wide = 4 if mx.default_device() == mx.cpu else size
    logits = chunks * chunk * shapes.vocabulary * wide
    backward = working + working_scores * score
    return MemoryPlan(
        batch_size=train.batch_size,
        length=length,
        grad_checkpoint=train.grad_checkpoint,
        weights=shapes.weight_bytes,
        adapter=trained,
        optimizer=optimizer,
        gradients=gradients,
        activations=kept + working,
        scores=(kept_scores + working_scores) * score,
        logits=logits,
        peak=always + kept + kept_scores * score + max(logits, backward),
        limit=limit,
    )


def _advise(shapes: ModelShapes, train: TrainConfig, limit: int) -> tuple[str, ...]:
    """Flags that make the training fit, added one by one until it does."""
    advice = []
    if not train.grad_checkpoint:
        train = replace(train, grad_checkpoint=True)
        advice.append("--grad-checkpoint")
    while plan_step(shapes, train, limit).peak > limit and train.batch_size > 1:
        half = train.batch_size // 2
        steps = train.grad_accumulation_steps * train.batch_size // half
        train = replace(train, batch_size=half, grad_accumulation_steps=steps)
    if train.grad_accumulation_steps > 1:
        advice.append(
            f"--batch-size {train.batch_size} --grad-accumulation-steps "
            f"{train.grad_accumulation_steps}"
        )
    plan = predict(shapes, train, limit)
    if not plan.fits:
        if plan.longest < 8:
            return (
                "a smaller or quantized model: this model does not fit at any length",
            )
        advice.append(f"--max-seq-length {plan.longest}")
    return tuple(advice)
