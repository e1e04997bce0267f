"""``mlx_dora.train``: fine-tunes a model, with the options of ``mlx_lm.lora``."""

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from mlx_dora.adapters.config import DoRAConfig
from mlx_dora.cli._config_file import config_file_option
from mlx_dora.cli._echo import echo
from mlx_dora.cli._framework import EXIT_BAD_INPUT, exit_code_of, verb
from mlx_dora.cli._options import dataclass_options
from mlx_dora.cli._progress import TrainDisplay, duration, size
from mlx_dora.cli._publish import command_line, publish, upload_option
from mlx_dora.cli._shell import quote
from mlx_dora.train.config import TrainConfig
from mlx_dora.train.run.journal import TrainReport

if TYPE_CHECKING:
    from mlx_dora.train.plan.predict import MemoryPlan

HOST_DEFAULT_MODEL = "Qwen/Qwen3-0.6b"


@verb("train")
@config_file_option
@dataclass_options(train=TrainConfig, dora=DoRAConfig)
@click.option(
    "--plan",
    is_flag=True,
    help="Predict the memory that training needs, and exit.",
)
@upload_option
def command(
    train: TrainConfig, dora: DoRAConfig, plan: bool, upload_repo: str | None
) -> int | None:
    """Fine-tune a model with DoRA (or LoRA, or in full).

    Accepts the flags and YAML files of mlx_lm.lora; trains by default.

    The data is a folder, a file or a data set on the Hugging Face Hub; mlx_dora.data
    lists the formats and shows what would be trained. The adapter's folder receives
    adapters.safetensors and adapter_config.json, which mlx-lm loads, log.jsonl, and
    loss.png if matplotlib is installed. On Ctrl-C, SIGTERM or SIGHUP, the command
    finishes the step, saves, and exits with 130, 143 or 129.
    """
    if train.model is None:
        echo(f"No model given: using mlx-lm's default, {HOST_DEFAULT_MODEL}.", err=True)
        train = replace(train, model=HOST_DEFAULT_MODEL)
    if plan:
        from mlx_dora.train.plan.predict import plan_memory

        for line in describe_plan(plan_memory(train, dora)):
            echo(line)
        return None
    import mlx.core as mx

    from mlx_dora.train.job import run_job

    if mx.distributed.init().rank() > 0:
        return _work_in_silence(train, dora)
    if upload_repo is not None:
        from mlx_dora.publish.upload import check_upload

        check_upload(upload_repo)
    display = TrainDisplay(train.iters if train.epochs is None else None)
    with display:
        result = run_job(
            train, dora, callback=display.report, progress=display.progress
        )
    if result.train is not None:
        for line in describe_training(result.train):
            echo(line)
        if result.plot is not None:
            echo(f"Loss plot: {result.plot}")
        else:
            echo("No loss plot: pip install 'mlx_dora[report]' to get one.")
    if result.test is not None:
        loss, perplexity = result.test.loss, result.test.perplexity
        tokens = f"{result.test.tokens:,} tokens"
        echo(f"Test loss {loss:.4f}, perplexity {perplexity:.3f} ({tokens}).")
    if result.train is not None:
        if upload_repo is not None:
            _publish_adapter(train, upload_repo)
        echo("Next:")
        for line in next_commands(train):
            echo(f"  {line}")
    return None


def _publish_adapter(train: TrainConfig, repo: str) -> None:
    from mlx_dora.publish.card import adapter_card

    data = train.data if train.hf_dataset is None else str(train.hf_dataset)
    card = adapter_card(train.adapter_path, str(train.model), command_line(), data)
    publish(train.adapter_path, card, repo)


def _work_in_silence(train: TrainConfig, dora: DoRAConfig) -> int:
    """Train in a process other than the first, which prints for all processes."""
    from mlx_dora.train.group import SharedError
    from mlx_dora.train.job import run_job

    for name in ("mlx_dora", "mlx_dora.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        run_job(train, dora)
    except SharedError:
        return EXIT_BAD_INPUT
    except KeyboardInterrupt as interrupt:
        return exit_code_of(interrupt)
    return 0


def describe_training(report: TrainReport) -> list[str]:
    """Summarize a training run as lines of text."""
    lines = [
        f"Trained {report.trainable_parameters / 1e6:.3f} M parameters in "
        f"{len(report.modules)} modules: {report.steps} steps, "
        f"{report.trained_tokens:,} tokens, {duration(report.seconds)}, peak memory "
        f"{size(report.peak_memory_bytes)}."
    ]
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


def describe_plan(plan: "MemoryPlan") -> list[str]:
    """Format a memory plan as lines of text."""
    recomputed = ", blocks recomputed" if plan.grad_checkpoint else ""
    parts = {
        "weights": plan.weights,
        "adapter": plan.adapter,
        "optimizer": plan.optimizer,
        "gradients": plan.gradients,
        "activations": plan.activations,
        "attention scores": plan.scores,
        "logits": plan.logits,
    }
    rows = (
        "the maximum; name --data to use its longest rows"
        if plan.rows is None
        else f"the longest of {plan.rows:,} rows"
    )
    lines = [
        f"Calculated for batches of {plan.batch_size} rows of {plan.length} tokens "
        f"({rows}){recomputed}:"
    ]
    lines += [f"  {name:<17}{size(count):>10}" for name, count in parts.items()]
    verdict = "fits into" if plan.fits else "does not fit into"
    lines.append(
        f"Peak {size(plan.peak)} (not all of it at once): {verdict} this machine's "
        f"{size(plan.limit)}."
    )
    fitting = []
    if plan.longest:
        fitting.append(f"{plan.batch_size} rows of up to {plan.longest:,} tokens")
    if plan.largest_batch:
        fitting.append(f"up to {plan.largest_batch:,} rows of {plan.length} tokens")
    if fitting:
        lines.append(f"Would fit: {', or '.join(fitting)}.")
    if plan.advice:
        lines.append(f"To make it fit: {' '.join(plan.advice)}")
    return lines


def next_commands(train: TrainConfig) -> list[str]:
    """Return commands to run next."""
    words = ["--model", str(train.model), "--adapter-path", train.adapter_path]
    models = " ".join(quote(word) for word in words)
    fused = quote(train.adapter_path.rstrip("/") + "-fused")
    lines = [f"mlx_dora.generate {models} --prompt 'Hello'"]
    if train.hf_dataset is None:
        lines.append(f"mlx_dora.evaluate {models} --data {quote(train.data)}")
    lines.append(f"mlx_dora.fuse {models} --save-path {fused}")
    return lines
