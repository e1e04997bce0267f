"""Predicts the memory of a training from the shapes of the model."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import mlx.core as mx

from mlx_dora.adapters.config import DoRAConfig
from mlx_dora.data.config import DEFAULT_DATA
from mlx_dora.data.counts import RowSizes
from mlx_dora.errors import DoRAError
from mlx_dora.train.config import TrainConfig
from mlx_dora.train.grpo.config import RewardConfig
from mlx_dora.train.objectives.config import PreferenceConfig
from mlx_dora.train.objectives.make import make_objective
from mlx_dora.train.objectives.objective import Objective
from mlx_dora.train.plan.attention import Device, this_device
from mlx_dora.train.plan.rows import largest_batches, row_sizes
from mlx_dora.train.plan.shapes import ModelShapes, read_shapes
from mlx_dora.train.plan.step import MemoryPlan, plan_step


def plan_memory(
    train: TrainConfig,
    dora: DoRAConfig,
    *,
    limit: int | None = None,
    lengths: Sequence[int] | RowSizes | None = None,
    device: Device | None = None,
    preference: PreferenceConfig | None = None,
    reward: RewardConfig | None = None,
    objective: Objective | None = None,
    processes: int = 1,
) -> MemoryPlan:
    """Predict the peak memory of a training, which its longest rows determine.

    Reads the config and the headers of the model's files, and the training data, but no
    weights. If no data is named, every row is taken to have the maximum length.

    Args:
        train: Settings of the training. Model, data, batch size, maximum length,
            optimizer, accumulation and checkpointing matter.
        dora: Settings of the adapter.
        limit: Bytes to fit into; default: this machine's limit.
        lengths: Tokens of each training row, if all are targets, or the rows' sizes;
            default: read from the data.
        device: Where to train; default: this machine's device. With `metal_device` and
            `limit`, the plan is for a Mac wherever it is made.
        preference: Settings of the objectives dpo, orpo, kto and simpo.
        reward: Settings of the objective grpo.
        objective: What to minimize; default: made from ``train.objective`` and its
            settings.
        processes: Number of processes that share each batch and, with ``shard``, the
            weights. The plan is for one of them.

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
    objective = objective or make_objective(train, preference, reward=reward)
    objective.check(train, dora)
    shapes = read_shapes(
        Path(train.model),
        dora,
        train.fine_tune_type,
        shard=train.shard,
        processes=processes,
    )
    if isinstance(lengths, RowSizes) or lengths is None:
        sizes = lengths
    else:
        sizes = RowSizes.of_lengths(lengths)
    if sizes is None and (train.data != DEFAULT_DATA or train.hf_dataset):
        sizes = row_sizes(train, objective)
    limit = memory_limit() if limit is None else limit
    device = this_device() if device is None else device
    document = None
    if train.packing and sizes is not None:
        document = min(max(sizes.lengths), train.max_seq_length)
    shapes = replace(
        shapes,
        rows_per_unit=objective.rows_per_unit,
        held=partial(objective.held_bytes, train),
    )
    steps = [
        (replace(shapes, target_share=share), step)
        for step, share in largest_batches(train, sizes, objective.rows_per_unit)
    ]
    how = limit, device, document, processes
    shapes, step = max(steps, key=lambda pair: plan_step(*pair, *how).peak)
    plan = predict(shapes, step, *how)
    advice = ()
    if not plan.fits:
        advice = _advise(shapes, step, *how, by_tokens=train.batch_tokens is not None)
    return replace(
        plan,
        rows=None if sizes is None else len(sizes.lengths),
        longest_row=_longest(train, sizes),
        packed=train.packing,
        advice=advice,
    )


def _longest(train: TrainConfig, sizes: RowSizes | None) -> int | None:
    """Tokens of the longest row after cutting; None if there is no row."""
    if sizes is None or not sizes.lengths:
        return None
    return min(max(sizes.lengths), train.max_seq_length)


def memory_limit() -> int:
    """Memory limit of this machine: an Apple GPU's working set, or MLX's limit."""
    info = mx.device_info()
    size = info.get("max_recommended_working_set_size") or info.get("memory_size")
    return min(int(size), mx.get_memory_limit()) if size else mx.get_memory_limit()


def predict(
    shapes: ModelShapes,
    train: TrainConfig,
    limit: int,
    device: Device | None = None,
    document: int | None = None,
    processes: int = 1,
) -> MemoryPlan:
    """Make the plan of a training, without advice. The arguments are `plan_step`'s."""
    device = this_device() if device is None else device
    how = limit, device, document, processes

    def fitting(change: Callable[[int], TrainConfig], most: int) -> int:
        least = 0
        while least < most:  # binary search for the largest that fits
            middle = (least + most + 1) // 2
            if plan_step(shapes, change(middle), *how).peak <= limit:
                least = middle
            else:
                most = middle - 1
        return least

    plan = plan_step(shapes, train, *how)
    longest = fitting(lambda n: replace(train, max_seq_length=8 * max(n, 1)), 1 << 17)
    rows = fitting(lambda n: replace(train, batch_size=max(n, 1)), 1 << 14)
    return replace(plan, longest=8 * longest, largest_batch=rows)


def _advise(
    shapes: ModelShapes,
    train: TrainConfig,
    limit: int,
    device: Device,
    document: int | None,
    processes: int,
    *,
    by_tokens: bool,
) -> tuple[str, ...]:
    """Flags that make the training fit, added one by one until it does."""
    advice = []
    if not train.grad_checkpoint:
        train = replace(train, grad_checkpoint=True)
        advice.append("--grad-checkpoint")
    how = limit, device, document, processes
    while plan_step(shapes, train, *how).peak > limit and train.batch_size > 1:
        half = train.batch_size // 2
        steps = train.grad_accumulation_steps * train.batch_size // half
        train = replace(train, batch_size=half, grad_accumulation_steps=steps)
    if train.grad_accumulation_steps > 1:
        size = f"--batch-size {train.batch_size}"
        if by_tokens:
            size = f"--batch-tokens {train.batch_size * train.max_seq_length}"
        steps = train.grad_accumulation_steps
        advice.append(f"{size} --grad-accumulation-steps {steps}")
    plan = predict(shapes, train, *how)
    if not plan.fits:
        if plan.longest < 8:
            return (
                "a smaller or quantized model: this model does not fit at any length",
            )
        advice.append(f"--max-seq-length {plan.longest}")
    return tuple(advice)
