"""The text that ``mlx_dora.train`` prints before and after a training."""

import dataclasses
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mlx_dora.adapters.config import DoRAConfig
from mlx_dora.cli._progress import duration, size
from mlx_dora.cli._shell import quote
from mlx_dora.data.config import DataConfig
from mlx_dora.train.config import TrainConfig
from mlx_dora.train.run.journal import TrainReport

if TYPE_CHECKING:
    from mlx_dora.train.objectives.objective import Measured
    from mlx_dora.train.plan.step import MemoryPlan
    from mlx_dora.train.plan.traffic import Traffic

LEGEND = "loss: mean over target tokens, in nats; tok/s: target tokens a second"
DORA_LEGEND = "; ΔM, ΔD: mean changes of the rows' lengths and directions"


def describe_start(train: TrainConfig, dora: DoRAConfig) -> list[str]:
    """Return the model and the settings as lines of text."""
    last = "block" if dora.num_layers == 1 else f"{dora.num_layers} blocks"
    blocks = "all blocks" if dora.num_layers < 0 else f"the last {last}"
    what = "all weights"
    goal = "" if train.objective == "sft" else f"{train.objective}, "
    if train.fine_tune_type != "full":
        kind = train.fine_tune_type.replace("dora", dora.variant)
        what = f"{kind}, rank {dora.rank}, scale {dora.scale:g}"
    length = (
        count(train.iters, "step")
        if train.epochs is None
        else count(train.epochs, "epoch")
    )
    rows = count(train.batch_size, "prompt" if train.objective == "grpo" else "row")
    if train.batch_tokens is not None:
        rows = f"up to {train.batch_tokens:,} tokens"
    rate = "a schedule" if train.lr_schedule else f"{train.learning_rate:g}"
    return [
        f"Model: {train.model}",
        f"Training: {goal}{what} in {blocks}; {length} of {rows}, "
        f"{train.optimizer}, learning rate {rate}",
        legend(train),
    ]


def legend(train: TrainConfig) -> str:
    """Say what the numbers of the reports are."""
    if train.objective == "grpo":
        return (
            "reward: mean over completions; validation loss: minus the mean reward; "
            "tok/s: sampled tokens a second"
        )
    if train.objective != "sft":
        return (
            f"loss: of {train.objective}, mean over a batch; accuracy and margin: of "
            "the rewards; tok/s: target tokens a second"
        )
    return LEGEND + (DORA_LEGEND if train.fine_tune_type == "dora" else "")


def describe_test(test: "Measured", train: TrainConfig) -> str:
    """Describe a result on the test data in one line."""
    tokens = f"{test.tokens:,} tokens"
    if train.objective == "sft":
        return (
            f"Test loss {test.loss:.4f}, perplexity {test.perplexity:.3f} ({tokens})."
        )
    metrics = "".join(f", {name} {v:.4f}" for name, v in test.metrics.items())
    return f"Test loss {test.loss:.4f}{metrics} ({tokens})."


def describe_training(report: TrainReport) -> list[str]:
    """Summarize a training run as lines of text."""
    steps = count(report.steps, "step")
    if report.first_step:
        more = count(report.steps - report.first_step, "more step")
        steps = f"{more}, {report.steps} in all"
    lines = [
        f"Trained {steps}: {report.trained_tokens:,} target tokens, "
        f"{duration(report.seconds)}, peak memory {size(report.peak_memory_bytes)}."
    ]
    if report.steps == report.first_step:
        lines = []  # the log says that nothing was left to do
    if report.first_val_loss is not None and report.val_loss is not None:
        before, after = report.first_val_loss, report.val_loss
        lines.append(f"Validation loss {before:.4f} before, {after:.4f} after.")
    if report.rows_truncated or report.rows_skipped:
        lines.append(
            f"Training rows cut: {report.rows_truncated}; skipped without a target: "
            f"{report.rows_skipped}."
        )
    lines.append(f"Adapter: {report.adapter_path}")
    return lines


def count(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural unless it is 1."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def describe_plan(plan: "MemoryPlan") -> list[str]:
    """Format a memory plan as lines of text."""
    recomputed = ", blocks recomputed" if plan.grad_checkpoint else ""
    parts = {
        "weights": plan.weights,
        "adapter": plan.adapter,
        "reference": plan.reference,
        "optimizer": plan.optimizer,
        "gradients": plan.gradients,
        "activations": plan.activations,
        "attention scores": plan.scores,
        "logits": plan.logits,
    }
    shared = f", shared by {plan.processes} processes" if plan.processes > 1 else ""
    lines = [
        f"Calculated for batches of {plan.batch_size} {_widest(plan)}{shared}"
        f"{recomputed}:"
    ]
    parts = {
        name: count for name, count in parts.items() if name != "reference" or count
    }
    if plan.gathered:
        parts["gathered at once"] = plan.gathered
    lines += [f"  {name:<17}{size(count):>10}" for name, count in parts.items()]
    each = " on each machine" if plan.processes > 1 else ""
    verdict = "fits into" if plan.fits else "does not fit into"
    lines.append(
        f"Peak {size(plan.peak)}{each} (not all of it at once): {verdict} this "
        f"machine's {size(plan.limit)}."
    )
    if plan.traffic is not None:
        lines += _describe_traffic(plan.traffic)
    fitting = []
    noun = "pairs of rows" if plan.rows_per_unit == 2 else "rows"
    if plan.longest:
        fitting.append(f"{plan.batch_size} {noun} of up to {plan.longest:,} tokens")
    if plan.largest_batch:
        fitting.append(f"up to {plan.largest_batch:,} {noun} of {plan.length} tokens")
    if fitting:
        lines.append(f"Would fit: {', or '.join(fitting)}.")
    if plan.advice:
        lines.append(f"To make it fit: {' '.join(plan.advice)}")
    return lines


def _describe_traffic(traffic: "Traffic") -> list[str]:
    parts = {
        "weights": traffic.weights,
        "embeddings": traffic.tokens,
        "activations": traffic.activations,
        "norms": traffic.norms,
        "gradients": traffic.gradients,
    }
    listed = ", ".join(f"{name} {size(n)}" for name, n in parts.items() if n)
    times = ", ".join(
        f"{s:.3g} s at {rate} Gb/s" for rate, s in traffic.seconds.items()
    )
    return [
        f"Each process sends {size(traffic.total)} per batch ({listed}).",
        f"The transfers alone take {times} (calculated).",
    ]


def _widest(plan: "MemoryPlan") -> str:
    """Describe the rows of the largest batch: their width, and why it is that."""
    tokens = f"{plan.length:,} tokens"
    noun = "pairs of rows" if plan.rows_per_unit == 2 else "rows"
    if plan.rows is None or plan.longest_row is None:
        return f"{noun} of {tokens} (the maximum; name --data to use its longest rows)"
    if plan.packed:
        return f"rows of {tokens} ({plan.rows:,} rows joined by --packing)"
    longest = f"the longest of {plan.rows:,} {noun}"
    if plan.longest_row == plan.length:
        return f"{noun} of {tokens} ({longest})"
    return f"{noun} padded to {tokens} ({longest} has {plan.longest_row:,})"


def next_commands(
    train: TrainConfig, *, chats: bool = False, evaluates: bool = True
) -> list[str]:
    """Return commands to run next.

    Args:
        train: Settings of the training.
        chats: Whether the model has a chat template.
        evaluates: Whether there is validation or test data.
    """
    adapter = f"--adapter-path {quote(train.adapter_path)}"
    fused = quote(train.adapter_path.rstrip("/") + "-fused")
    lines = [f"mlx_dora.generate {adapter} --prompt Hello"]
    if chats:
        lines.append(f"mlx_dora.chat {adapter}")
    if evaluates and train.objective != "grpo":  # prompts alone have no loss
        lines.append(f"mlx_dora.evaluate {adapter} {' '.join(_data_words(train))}")
    lines.append(f"mlx_dora.fuse {adapter} --save-path {fused}")
    return lines


def _data_words(train: TrainConfig) -> list[str]:
    """The options that make another command read the data as the training did."""
    words = [] if train.hf_dataset else ["--data", quote(train.data)]
    names = [field.name for field in dataclasses.fields(DataConfig)]
    for field in dataclasses.fields(train):
        value = getattr(train, field.name)
        is_read = field.name in (*names, "max_seq_length") and field.name != "data"
        if is_read and value != field.default:
            words += _flag(field.name, value)
    return words


def _flag(name: str, value: Any) -> list[str]:
    flag = f"--{name.replace('_', '-')}"
    if isinstance(value, bool):
        return [flag if value else f"--no-{flag[2:]}"]
    return [flag, quote(value if isinstance(value, str) else json.dumps(value))]


def resume_command(words: Sequence[str]) -> str:
    """Return the command line that resumes an interrupted training.

    Args:
        words: The words of the interrupted command.
    """
    left_out = ("--overwrite", "--resume")
    kept = [word for word in words if word not in left_out]
    return " ".join(map(quote, [*kept, "--resume"]))
