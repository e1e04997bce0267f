"""Training steps, decoding and losses of a 1B-shaped model: ours, and mlx-lm's.

    python benchmarks/gpu/steps.py --ranks 8 64 384 --output results.jsonl [--bits 4]

Kinds: mlx-lm's LoRA and DoRA, ours with the measured choice (`ours`) and in plain MLX
(`ours-plain`). All kinds start from the same factors on one base, and take their steps
in turn. The step is mlx-lm's: loss, gradients, AdamW, compiled. Memory is the peak of a
step beyond what is alive. `--tiny` runs on a CPU in a minute.
"""

import mlx_dora  # isort: skip - loads OpenBLAS, so before mlx

import argparse
import contextlib
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import _models
import _profile
import _turns
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten

from mlx_dora.kernels.choice import device_facts
from mlx_dora.kernels.dispatch import SWITCH
from mlx_dora.kernels.measure import Decisions, decide
from mlx_dora.layers import held_norms
from mlx_dora.layers.calls import inference_cases, training_cases

ROUNDS, STEPS_OF_ROUND = 8, 3
PROMPT, DECODED = 64, 48


class Trainer:
    """A model of a kind with mlx-lm's compiled step.

    Args:
        bases: Makes the models.
        kind: A name of `_models.KINDS`.
        rank: Rank of the adapter.
        batch: Tokens, shape ``(rows, length + 1)``.
        learning_rate: Of AdamW.
    """

    def __init__(
        self,
        bases: _models.Bases,
        kind: str,
        rank: int,
        batch: mx.array,
        learning_rate: float = 1e-5,
    ) -> None:
        from mlx_lm.tuner.trainer import default_loss

        self._kind, self._batch = kind, batch
        rows, width = batch.shape
        self._lengths = mx.array([[0, width - 1]] * rows)
        self.model = bases.adapted(kind, rank)
        self.model.train()
        self.decisions: Decisions | None = None
        with self._switched():
            if kind.startswith("ours"):
                cases = training_cases(self.model, [rows * (width - 1)])
                self.decisions = decide(cases)
        optimizer = optim.AdamW(learning_rate=learning_rate)
        optimizer.init(self.model.trainable_parameters())
        self._differentiate = nn.value_and_grad(self.model, default_loss)
        state = [self.model.state, optimizer.state, mx.random.state]

        @partial(mx.compile, inputs=state, outputs=state)
        def step(batch: mx.array, lengths: mx.array) -> mx.array:
            (loss, _), gradient = self._differentiate(self.model, batch, lengths)
            optimizer.update(self.model, gradient)
            return loss

        self._step, self._state = step, state

    @contextlib.contextmanager
    def _switched(self):
        """Set the switch of the kernels, and hold the choice and the norms."""
        before = os.environ.get(SWITCH)
        if self._kind == "ours-plain":
            os.environ[SWITCH] = "reference"
        try:
            yield
        finally:
            if before is None:
                os.environ.pop(SWITCH, None)
            else:
                os.environ[SWITCH] = before

    @contextlib.contextmanager
    def _held(self):
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._switched())
            if self.decisions is not None:
                stack.enter_context(self.decisions.holding())
                stack.enter_context(held_norms(self.model))
            yield

    def __call__(self) -> float:
        """Take a step, and return its loss."""
        with self._held():
            loss = self._step(self._batch, self._lengths)
            mx.eval(loss, self._state)
        return float(loss)

    def gradient(self) -> dict[str, mx.array]:
        """Return the gradient of the loss by name, without a step."""
        with self._held():
            _, gradient = self._differentiate(self.model, self._batch, self._lengths)
            mx.eval(gradient)
        return dict(tree_flatten(gradient))  # pyright: ignore[reportReturnType]


def milliseconds(call: Callable[[], Any]) -> float:
    """Return the wall time of a call."""
    mx.synchronize()
    began = time.perf_counter()
    call()
    mx.synchronize()
    return 1e3 * (time.perf_counter() - began)


def peak_mib(call: Callable[[], Any]) -> float:
    """Return the peak of MLX's memory in a call, beyond what is alive before it."""
    mx.clear_cache()
    alive = mx.get_active_memory()
    mx.reset_peak_memory()
    call()
    mx.synchronize()
    return (mx.get_peak_memory() - alive) / 2**20


def spread(values: list[float]) -> dict[str, float]:
    """Return median and 20th and 80th percentile."""
    ordered = sorted(values)
    fifth = len(ordered) // 5
    return {
        "median": round(statistics.median(ordered), 3),
        "p20": round(ordered[fifth], 3),
        "p80": round(ordered[-1 - fifth], 3),
    }


def in_turn(calls: dict[str, Callable[[], float]], rounds: int) -> dict[str, Any]:
    """Time each call in every round, each round from another one on."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds):
        names = [*calls]
        names = names[number % len(names) :] + names[: number % len(names)]
        for name in names:
            times[name].append(calls[name]())
    return {name: spread(values) for name, values in times.items()}


def training(
    bases: _models.Bases, rank: int, batch: mx.array, emit: Callable[..., None]
) -> None:
    """Measure the steps of every kind at a rank."""
    trainers, facts = {}, {}
    for kind in _models.KINDS:
        began = time.perf_counter()
        trainer = trainers[kind] = Trainer(bases, kind, rank, batch)
        built = time.perf_counter() - began
        first = milliseconds(trainer)
        trainer()
        chosen = None if trainer.decisions is None else asdict(trainer.decisions)
        facts[kind] = {"built_s": built, "first_ms": first, "decisions": chosen}
    _turns.ready()

    def several(trainer: Trainer) -> float:
        steps = range(STEPS_OF_ROUND)
        return milliseconds(lambda: [trainer() for _ in steps]) / STEPS_OF_ROUND

    times = in_turn({k: partial(several, t) for k, t in trainers.items()}, ROUNDS)
    for kind, trainer in trainers.items():
        emit(
            what="step",
            kind=kind,
            rank=rank,
            tokens=list(batch.shape),
            ms=times[kind],
            over_lora=times[kind]["median"] / times["lora"]["median"],
            extra_mib=peak_mib(trainer),
            gpu_us=_profile.microseconds(lambda _, run=trainer: run(), 2),
            **facts[kind],
        )


def losses(
    bases: _models.Bases, rank: int, batch: mx.array, emit: Callable[..., None]
) -> None:
    """Record 20 losses of every kind, ours twice, and gradients of ours."""
    curves = {}
    for name in (*_models.KINDS, "ours again"):
        trainer = Trainer(bases, name.split()[0], rank, batch, 2e-3)
        curves[name] = [trainer() for _ in range(20)]
    by_choice = Trainer(bases, "ours", rank, batch).gradient()
    by_plain = Trainer(bases, "ours-plain", rank, batch).gradient()
    worst: dict[str, float] = {}
    for name, truth in by_plain.items():
        off = mx.square(by_choice[name] - truth).sum() / mx.square(truth).sum()
        leaf = name.rpartition(".")[2]
        worst[leaf] = max(worst.get(leaf, 0.0), float(mx.sqrt(off)))
    pairs = zip(curves["ours"], curves["ours-plain"], strict=True)
    emit(
        what="losses",
        rank=rank,
        curves=curves,
        worst_difference=max(abs(a - b) / b for a, b in pairs),
        same_bits_twice=curves["ours"] == curves["ours again"],
        gradient_errors=worst,
    )


def decoding(bases: _models.Bases, rank: int, emit: Callable[..., None]) -> None:
    """Measure milliseconds a token of `mlx_lm.generate`'s steps, unfused."""
    from mlx_lm.generate import generate_step

    models = {kind: bases.adapted(kind, rank).eval() for kind in _models.KINDS[:3]}
    decide(inference_cases(models["ours"], (1, PROMPT)))
    prompt = mx.arange(PROMPT) % bases.shape["vocab_size"]

    def token(model: nn.Module) -> float:
        stamps = []
        for _ in generate_step(prompt, model, max_tokens=DECODED):
            stamps.append(time.perf_counter())
        gaps = [1e3 * (b - a) for a, b in pairwise(stamps)]
        return statistics.median(gaps)

    for model in models.values():
        token(model)
    times = in_turn({k: partial(token, m) for k, m in models.items()}, 4)
    for kind, spread_ in times.items():
        ratio = spread_["median"] / times["lora"]["median"]
        emit(what="decode", kind=kind, rank=rank, ms=spread_, over_lora=ratio)


def main() -> None:
    """Measure all ranks, and write a line of JSON for each result."""
    parser = argparse.ArgumentParser(description="Training steps, decoding, losses")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 384])
    parser.add_argument("--bits", type=int, default=0, choices=(0, 4))
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    if not options.tiny:
        mx.set_cache_limit(4 << 30)  # processes side by side share the card
    bases = _models.Bases(options.tiny, options.bits)
    length = 16 if options.tiny else options.length
    mx.random.seed(3)
    shape = (options.rows, length + 1)
    batch = mx.random.randint(0, bases.shape["vocab_size"], shape)
    mx.eval(batch)
    common = {
        "mlx_dora": mlx_dora.__version__,
        "bits": options.bits,
        "tiny": options.tiny,
        "device": device_facts(),
    }
    with options.output.open("a") as file:

        def emit(**facts: Any) -> None:
            file.write(json.dumps({**common, **facts}) + "\n")
            file.flush()
            hidden = ("decisions", "curves", "device")
            shown = {k: v for k, v in facts.items() if k not in hidden}
            print(json.dumps(shown), flush=True)

        for rank in options.ranks:
            training(bases, rank, batch, emit)
            mx.clear_cache()
        for rank in options.ranks:
            decoding(bases, rank, emit)
        losses(bases, options.ranks[0], batch, emit)
    _turns.done()


if __name__ == "__main__":
    main()
