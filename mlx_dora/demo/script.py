"""The demo from start to end: data, training, changes, samples, fuse and check.

Meant as an example: each step is one call of the library, the same call that
``mlx_dora.train``, ``evaluate`` and ``fuse`` make.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_dora.adapters.config import DoRAConfig
from mlx_dora.adapters.hosting import load
from mlx_dora.adapters.keys import blocks
from mlx_dora.adapters.surgery import disabled
from mlx_dora.data.dataset import Dataset
from mlx_dora.data.loading import load_datasets
from mlx_dora.demo.changes import MatrixChange, matrix_changes
from mlx_dora.demo.config import DemoConfig
from mlx_dora.demo.data import write_demo_data
from mlx_dora.demo.model import demo_model
from mlx_dora.errors import DoRAError
from mlx_dora.evaluate.agreement import Agreement, compare_probe, take_probe
from mlx_dora.evaluate.generation import Prompt, generate_samples, sample_prompts
from mlx_dora.fuse.model import fuse_dora, save_fused
from mlx_dora.io.atomic import check_output
from mlx_dora.train import StepReport, TrainConfig, TrainReport, finetune

DEFAULT_OUTPUT = "mlx_dora_demo"

BATCH_SIZE = 4
ADAPTED_BLOCKS = 8
RANK, SCALE, LEARNING_RATE = 8, 2.0, 5e-4
VALIDATION_BATCHES = 16
MAX_SEQ_LENGTH = 128  # the rows have 50 to 110 tokens
SAMPLES = 3
SAMPLE_TOKENS = 40


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A question of the test set with three answers."""

    question: str
    expected: str
    base: str
    adapted: str


@dataclass(frozen=True, kw_only=True)
class DemoReport:
    """Files and results of the demo.

    Args:
        model: Folder of the base model.
        data: Folder of the data.
        adapter: Folder of the adapter.
        fused: Folder of the fused model.
        changes: Changes of the adapted matrices, largest first.
        training: The report of `finetune`.
        samples: Answers with and without the adapter.
        agreement: Comparison of the fused model, read from disk, and the unfused model.
        seconds: Total duration.
    """

    model: str
    data: Path
    adapter: Path
    fused: Path
    training: TrainReport
    changes: Sequence[MatrixChange]
    samples: Sequence[Sample]
    agreement: Agreement
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Audience:
    """Callbacks that receive the demo's events; all are optional.

    Args:
        stage: Called at the start of a stage with its title and a sentence.
        note: Called with a line about the current stage.
        step: Called with each training report.
        progress: Progress callback, as for `finetune`.
        trained: Called with the result of training.
        changed: Called with the changes of the adapted matrices.
        sampled: Called with the sample answers.
    """

    stage: Callable[[str, str], None] = lambda title, text: None
    note: Callable[[str], None] = lambda text: None
    step: Callable[[StepReport], None] = lambda report: None
    progress: Callable[[str, int, int], None] | None = None
    trained: Callable[[TrainReport], None] = lambda report: None
    changed: Callable[[Sequence[MatrixChange]], None] = lambda changes: None
    sampled: Callable[[Sequence[Sample]], None] = lambda samples: None


def run_demo(config: DemoConfig, audience: Audience | None = None) -> DemoReport:
    """Run the complete workflow on a real model and real data, in a new folder.

    Raises:
        DoRAError: If the output exists, the model is not available, or the fused model
            does not agree with the unfused model.
    """
    events = audience or Audience()
    started = time.perf_counter()
    output = config.output or _fresh_folder(Path(DEFAULT_OUTPUT))
    check_output(output, inputs=(config.model,))

    source, model, tokenizer = _load_model(config, events)
    train = _training(config, source, output)
    train_set, valid_set, test_set = _make_data(train, tokenizer, output, events)
    trained = _train(model, tokenizer, train_set, valid_set, train, output, events)

    events.stage(
        "Changes", "How far rows grew (ΔM) and turned (ΔD), largest turn first."
    )
    changes = matrix_changes(model)
    events.changed(changes)

    events.stage(
        "Answers", "Questions the model was not trained on, from other modules."
    )
    samples = _samples(model, tokenizer, test_set)
    events.sampled(samples)

    events.stage(
        "Fuse", "Merge the adapter into the weights, save, read back and compare."
    )
    probe = take_probe(model, test_set, rows=8, max_seq_length=MAX_SEQ_LENGTH)
    fuse_dora(model)
    save_fused(model, tokenizer, source, output / "fused")
    del model
    mx.clear_cache()
    fused, _ = load(output / "fused")
    agreement = compare_probe(fused, probe)
    _check_agreement(agreement)
    return DemoReport(
        model=source,
        data=output / "data",
        adapter=output / "adapter",
        fused=output / "fused",
        training=trained,
        changes=changes,
        samples=samples,
        agreement=agreement,
        seconds=time.perf_counter() - started,
    )


def _load_model(config: DemoConfig, events: Audience) -> tuple[str, nn.Module, Any]:
    """Load the base model; return its folder or Hub id, the model and tokenizer."""
    name = config.model or "SmolLM2-135M-Instruct, a small language model"
    events.stage("Model", f"{name}.")
    source = config.model or str(demo_model(notify=events.note))
    events.note(source)
    return source, *load(source)


def _make_data(
    train: TrainConfig, tokenizer: Any, output: Path, events: Audience
) -> tuple[Dataset, Dataset, Dataset]:
    """Write the demo's rows and load its training, validation and test sets."""
    events.stage(
        "Data", "What functions of Python's standard library do, by docstring."
    )
    rows = write_demo_data(output / "data")
    events.note(
        ", ".join(f"{number} {name}" for name, number in rows.items()) + " rows"
    )
    sets = load_datasets(train, tokenizer)
    train_set, valid_set, test_set = (sets[n] for n in ("train", "valid", "test"))
    assert train_set is not None and valid_set is not None and test_set is not None
    return train_set, valid_set, test_set


def _train(
    model: nn.Module,
    tokenizer: Any,
    train_set: Dataset,
    valid_set: Dataset,
    train: TrainConfig,
    output: Path,
    events: Audience,
) -> TrainReport:
    """Train a DoRA adapter on the last blocks of the model."""
    events.stage(
        "Training",
        f"A DoRA adapter of rank {RANK} on the last blocks, "
        f"{train.iters} steps of {BATCH_SIZE} rows.",
    )
    adapted = min(ADAPTED_BLOCKS, len(blocks(model)))
    report = finetune(
        model,
        tokenizer,
        train_set,
        valid_set,
        train=train,
        dora=DoRAConfig(rank=RANK, scale=SCALE, num_layers=adapted),
        adapter_path=output / "adapter",
        callback=events.step,
        progress=events.progress,
    )
    events.trained(report)
    return report


def _fresh_folder(wanted: Path) -> Path:
    """Return the folder, or else the first of ``-2``, ``-3``, ... that is missing."""
    names = (wanted.with_name(f"{wanted.name}-{number}") for number in count(2))
    return wanted if not wanted.exists() else next(n for n in names if not n.exists())


def _training(config: DemoConfig, source: str, output: Path) -> TrainConfig:
    return TrainConfig(
        model=source,
        data=str(output / "data"),
        mask_prompt=True,  # learn only the answers
        seed=config.seed,
        batch_size=BATCH_SIZE,
        iters=config.iters,
        learning_rate=LEARNING_RATE,
        val_batches=VALIDATION_BATCHES,
        steps_per_eval=config.iters,  # before the first step and after the last
        steps_per_report=max(1, min(10, config.iters)),
        save_every=config.iters,
        max_seq_length=MAX_SEQ_LENGTH,
    )


def _samples(model: nn.Module, tokenizer: Any, test_set: Dataset) -> list[Sample]:
    prompts = sample_prompts(test_set, tokenizer, SAMPLES)
    adapted = generate_samples(model, tokenizer, prompts, max_tokens=SAMPLE_TOKENS)
    with disabled(model):
        base = generate_samples(model, tokenizer, prompts, max_tokens=SAMPLE_TOKENS)
    return [
        Sample(question=_question(prompt), expected=prompt.expected, base=b, adapted=a)
        for prompt, b, a in zip(prompts, base, adapted, strict=True)
    ]


def _question(prompt: Prompt) -> str:
    """Return the question without the surrounding chat template."""
    start = prompt.text.find("What does Python's")
    return prompt.text[start:].split("?")[0] + "?" if start >= 0 else prompt.text


def _check_agreement(agreement: Agreement) -> None:
    if (
        not agreement.relative_logit_difference < 1e-2
        or abs(agreement.loss_difference) > 1e-2
    ):
        raise DoRAError(
            "the fused model does not agree with the unfused model: its logits are "
            f"{agreement.relative_logit_difference:.1e} off (relative), its loss "
            f"{agreement.loss_difference:+.1e}. Please report this with the output of "
            "mlx_dora.doctor."
        )
