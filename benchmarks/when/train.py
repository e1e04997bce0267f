"""One run of study 1: a method trained on a task, and its outcome."""

import hashlib
import tempfile
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from _methods import METHODS, equal_ranks
from _packed import ROWS, Packed, Row, packed_loss, target_logits
from grid import Cell, Job
from mlx.utils import tree_flatten
from tasks import TOPICS

from mlx_dora.adapters.config import DoRAConfig
from mlx_dora.adapters.hosting import load
from mlx_dora.adapters.keys import last_blocks
from mlx_dora.adapters.surgery import adapter_layers, apply_dora, dora_layers
from mlx_dora.analyze.spectrum import effective_rank
from mlx_dora.data.loading import load_datasets
from mlx_dora.errors import DoRAError
from mlx_dora.evaluate.loss import eval_mode
from mlx_dora.matrix.geometry import pair_geometry
from mlx_dora.matrix.weight import dense, weight_of
from mlx_dora.train.config import TrainConfig
from mlx_dora.train.run.finetune import finetune
from mlx_dora.train.run.journal import TrainReport

BLOCKS, BATCH, SCALE, LONGEST = 2, 4, 2.0, 192


class Bench:
    """A task on a base: its rows, and the activations behind the frozen blocks.

    A packed base is dequantized first, which changes no result but rounding: a product
    of packed weights takes some twenty times as long on a CPU.

    Args:
        data: Folder of the task; the activations are kept in it.
        model: Folder of the base.
    """

    def __init__(self, data: Path, model: Path) -> None:
        from mlx_lm.utils import dequantize_model

        loaded, self._tokenizer = load(model)
        self._model: Any = dequantize_model(loaded)
        sets = load_datasets(
            TrainConfig(data=str(data), mask_prompt=True),
            self._tokenizer,
            ("train", "valid", "test"),
        )
        self.rows: dict[str, list[Row]] = {}
        for split, rows in sets.items():
            assert rows is not None
            self.rows[split] = [_checked(rows[i]) for i in range(len(rows))]
        self._frozen = len(self._model.layers) - BLOCKS
        self._packed = Packed(
            self._model,
            self._frozen,
            [row for rows in self.rows.values() for row in rows],
            data / f"activations-{model.name}.npy",
        )
        self._labels = None
        if {row[0][row[1]] for row in self.rows["test"]} == _firsts(self._tokenizer):
            self._labels = sorted(_firsts(self._tokenizer))
        self.untrained = self.outcome(self._model, "valid").mean

    @property
    def test_targets(self) -> list[int]:
        """Number of targets of each test row."""
        return [len(tokens) - first for tokens, first in self.rows["test"]]

    def run(self, job: Job, *, with_geometry: bool) -> dict[str, Any]:
        """Train and measure.

        Args:
            job: The run.
            with_geometry: Also measure how the weights changed.

        Returns:
            The line's outcome; losses are None if the training ended with NaN.
        """
        model = copy_model(self._model)
        before = _matrices(model) if with_geometry else {}
        try:
            report = self._train(model, job)
        except DoRAError as error:
            if "was not finite" not in str(error):  # no outcome of the method
                raise
            return {"valid_loss": None, "failure": str(error)[:200]}
        valid, test = self.outcome(model, "valid"), self.outcome(model, "test")
        if not np.isfinite(valid.mean):
            return {"valid_loss": None, "failure": "the validation loss is NaN"}
        result = {
            "trainable": report.trainable_parameters,
            "skipped_steps": report.steps_skipped,
            "valid_loss": round(valid.mean, 6),
            "diverged": valid.mean > self.untrained,
            "test_loss": round(test.mean, 6),
            "right": round(float(test.right.mean()), 4),
            "row_losses": [round(float(loss), 4) for loss in test.losses],
            "digest": test.digest,
        }
        if with_geometry:
            result["geometry"] = _geometry(before, _matrices(model))
        return result

    def _train(self, model: Any, job: Job) -> TrainReport:
        cell, rate = job.cell, job.cell.rate(job.place)
        config = TrainConfig(
            fine_tune_type=METHODS[_kind(cell)].kind,  # pyright: ignore[reportArgumentType]
            seed=job.seed,
            batch_size=BATCH,
            iters=cell.steps,
            learning_rate=rate,
            lr_schedule={
                "name": "linear_schedule",
                "arguments": [rate, 0.0, cell.steps],
            },
            optimizer_config={"adam": {"bias_correction": True}},
            steps_per_report=cell.steps,
            save_every=cell.steps,
            mask_prompt=True,
            max_seq_length=LONGEST,
            val_batches=0,
            memory_limit=0,  # whatever else runs here
        )
        dora = DoRAConfig(rank=cell.rank or 1, scale=SCALE, num_layers=BLOCKS)
        if cell.equal_to:
            dora = equal_ranks(model, METHODS["lora"], replace(dora, rank=cell.rank))
        elif cell.method == "magnitude":
            dora = replace(dora, variant="magnitude")
        if cell.method == "direction":
            apply_direction(model, dora, job.seed)
        with tempfile.TemporaryDirectory() as folder:
            return finetune(
                model,
                self._tokenizer,
                self.rows["train"],
                None,
                train=config,
                dora=dora,
                adapter_path=Path(folder) / "adapter",
                loss=packed_loss(self._frozen),
                batches=self._packed.batches(),
                callback=lambda _: None,
            )

    def outcome(self, model: Any, split: str) -> "Outcome":
        """Measure each row of a split."""
        losses, right = [], []
        rows = self.rows[split]
        with eval_mode(model):
            for start in range(0, len(rows), ROWS):
                some = rows[start : start + ROWS]
                batch = self._packed.batch(some)
                logits = target_logits(model, self._frozen, batch)
                each = nn.losses.cross_entropy(logits, batch.targets)
                counts = [len(tokens) - first for tokens, first in some]
                firsts = np.cumsum([0, *counts[:-1]])
                losses.append(np.add.reduceat(np.array(each, np.float64), firsts))
                right.append(self._right(logits, batch.targets, firsts))
        count = sum(len(tokens) - first for tokens, first in rows)
        return Outcome(np.concatenate(losses), np.concatenate(right), count)

    def _right(
        self, logits: mx.array, targets: mx.array, firsts: np.ndarray
    ) -> np.ndarray:
        """Whether each row's label ranks first, or every token of its answer does."""
        if self._labels is not None:
            names, places = mx.array(self._labels), mx.array(firsts)
            first = names[mx.argmax(logits[places][:, names], axis=-1)]
            return np.array(first == targets[places])
        hits = np.array(mx.argmax(logits, axis=-1) == targets)
        return np.logical_and.reduceat(hits, firsts)


@dataclass(frozen=True)
class Outcome:
    """Summed losses (float64) and successes of the rows of a split.

    Attributes:
        losses: Loss of each row, summed over its targets.
        right: Whether each row is right.
        count: Number of targets.
    """

    losses: np.ndarray
    right: np.ndarray
    count: int

    @property
    def mean(self) -> float:
        """Mean loss per target."""
        return float(self.losses.sum() / self.count)

    @property
    def digest(self) -> str:
        """Hash of the losses' bits."""
        return hashlib.sha256(self.losses.astype("<f8").tobytes()).hexdigest()[:16]


def apply_direction(model: Any, dora: DoRAConfig, seed: int) -> None:
    """Adapt a model by DoRA with frozen magnitudes; `finetune` then trains it."""
    mx.random.seed(seed)  # as `finetune` does, for the same A
    apply_dora(model, dora)
    for _, layer in dora_layers(model):
        layer.freeze(keys=["m"], recurse=False)


def copy_model(model: Any) -> Any:
    """Copy the modules of a model; the arrays, which never change, are shared."""
    arrays = [array for _, array in tree_flatten(model.parameters())]
    return deepcopy(model, {id(array): array for array in arrays})


def _kind(cell: Cell) -> str:
    return "dora" if cell.method == "direction" else cell.method


def _checked(row: Any) -> Row:
    tokens, first = row
    assert isinstance(first, int) and len(tokens) <= LONGEST, len(tokens)
    return tokens, first


def _firsts(tokenizer: Any) -> set[int]:
    """First token of each label of the task *topics*."""
    return {tokenizer.encode(topic, add_special_tokens=False)[0] for topic in TOPICS}


def _matrices(model: Any) -> dict[str, mx.array]:
    """Return the dense matrices of the trained blocks by path."""
    adapted = dict(adapter_layers(model))
    matrices = {
        path: layer.fuse(dequantize=True).weight for path, layer in adapted.items()
    }
    for path, block in last_blocks(model, BLOCKS):
        for name, module in block.named_modules():
            is_linear = isinstance(module, nn.Linear | nn.QuantizedLinear)
            if is_linear and not adapted:
                matrices[f"{path}.{name}"] = dense(weight_of(module))
    return matrices


def _geometry(
    before: Mapping[str, mx.array], after: Mapping[str, mx.array]
) -> dict[str, list[float]]:
    """Mean delta M and D of each matrix, and the effective rank of its change."""
    rows: dict[str, list[float]] = {}
    for path, weight in before.items():
        geometry = pair_geometry(weight, after[path])
        change = np.array(after[path].astype(mx.float32) - weight.astype(mx.float32))
        values = np.linalg.svd(change, compute_uv=False)
        measured = geometry.mean_delta_m, geometry.mean_delta_d, effective_rank(values)
        rows[path] = [float(f"{value:.6g}") for value in measured]
    return rows
