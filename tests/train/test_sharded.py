"""Training with a model's frozen weights divided among processes."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_dora.train import plan_memory
from tests.checks import assert_close, to_numpy
from tests.train import ring
from tests.train.saved import log, tensors
from tests.train.sharded import STEPS, Case, gradients, train, words

CASES = (
    Case(name="dense-dora-tied", dora={"dropout": 0.0}),
    Case(
        name="packed-dora-untied",
        bits=4,
        model={"tie_word_embeddings": False, "attention_bias": True},
        train={"grad_checkpoint": True},
        dora={"num_layers": 1},
    ),
    Case(
        name="dense-lora-untied",
        model={"tie_word_embeddings": False},
        train={
            "fine_tune_type": "lora",
            "grad_accumulation_steps": 2,
        },
    ),
    Case(
        name="packed-lora-tied",
        bits=4,
        train={"fine_tune_type": "lora", "grad_checkpoint": True},
    ),
    Case(
        name="packed-dora-head",
        bits=4,
        dora={"keys": ["self_attn.q_proj", "mlp.down_proj", "model.embed_tokens"]},
    ),
)
FEEDS = (
    Case(name="joined-rows", train={"packing": True}, writes_gradients=False),
    Case(name="by-tokens", train={"batch_tokens": 96}, writes_gradients=False),
)


def shortened(case: Case) -> Case:
    """The case with two steps: of four processes, most wait for a core."""
    few = {"iters": 2, "steps_per_eval": 2, "save_every": 2}
    return replace(case, train={**case.train, **few})


def run(work: Path, folder: Path, processes: int, *cases: Case) -> None:
    commands = [words(folder, *cases)] * processes
    with ring.started(work, *commands) as started:
        for process in started:
            _, errors = process.communicate(timeout=400)
            assert process.wait() == 0, errors


@pytest.mark.parametrize(
    ("processes", "cases"),
    [
        pytest.param(2, CASES + FEEDS[:1], id="two"),
        pytest.param(4, (shortened(CASES[0]),), id="four"),
        pytest.param(4, CASES[1:2], id="four-packed", marks=pytest.mark.slow),
    ],
)
def test_losses_and_gradients_equal_those_of_a_single_process(
    tmp_path: Path, processes: int, cases: tuple[Case, ...]
) -> None:
    compare(tmp_path, processes, cases)


@pytest.mark.compiled
def test_compiled_steps_equal_those_of_a_single_process(tmp_path: Path) -> None:
    few = {"iters": 5, "save_every": 5, "grad_checkpoint": True, "max_seq_length": 25}
    case = replace(CASES[1], train=few, length=25, compiles=True)
    compare(tmp_path, 2, (replace(case, writes_gradients=False),))


def test_batches_by_tokens_train_as_with_whole_weights(tmp_path: Path) -> None:
    whole = replace(FEEDS[1], name="whole", shard=None)
    run(tmp_path, tmp_path / "ring", 2, FEEDS[1], whole)
    assert_same_log(tmp_path / "ring" / "whole", tmp_path / "ring" / FEEDS[1].name)


def assert_same_log(other: Path, folder: Path) -> None:
    """Compare the numbers of two logs."""
    expected_log, ring_log = log(other), log(folder)
    assert len(expected_log) == len(ring_log)
    for expected, line in zip(expected_log, ring_log, strict=True):
        assert line.keys() == expected.keys()
        for name in {"train_loss", "val_loss", "delta_m", "delta_d"} & line.keys():
            assert line[name] == pytest.approx(expected[name], rel=1e-5), folder.name
        assert line["trained_tokens"] == expected["trained_tokens"]


def compare(work: Path, processes: int, cases: tuple[Case, ...]) -> None:
    """Train in a ring and alone; compare logs, weights and gradients."""
    run(work, work / "ring", processes, *cases)
    alone = mx.distributed.init()
    for case in cases:
        folder, other = work / "ring" / case.name, work / "alone" / case.name
        train(case, other)
        per_update = case.settings.grad_accumulation_steps
        assert len(log(folder)) > case.settings.iters // per_update
        assert_same_log(other, folder)
        weights = tensors(other)
        for name, value in tensors(folder).items():
            # Adam's first steps amplify the rounding of gradients near 0.
            assert_close(value, to_numpy(weights[name]), bound=2e-4)
        if not case.writes_gradients:
            continue
        values = mx.load(str(folder / "gradients.safetensors"))
        assert isinstance(values, dict)
        truth = gradients(case, alone)
        assert values.keys() == truth.keys()
        for name, value in values.items():
            assert np.abs(to_numpy(truth[name])).max() > 0, name
            assert_close(value, to_numpy(truth[name]), bound=1e-5)


LENGTH = 25


def sent_and_planned(
    case: Case, folder: Path, make_tiny_folder: Callable[..., Path]
) -> tuple[float, int]:
    """Return the bytes that an update sends, as counted in `folder` and as planned."""
    totals = json.loads((folder / case.name / "sent.json").read_text())
    model = make_tiny_folder(f"model-{case.name}", bits=case.bits, **case.model)
    plan = plan_memory(
        replace(case.settings, model=str(model)),
        case.adapter,
        lengths=[LENGTH] * 8,
        processes=2,
    )
    assert plan.traffic is not None
    planned = plan.traffic.total * case.settings.grad_accumulation_steps
    return float(np.median(np.diff(totals))), planned


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's counts of TCP")
def test_what_a_step_sends_is_what_the_plan_says(
    make_tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    quiet = {
        "steps_per_report": STEPS + 1,  # reports are sent, too
        "steps_per_eval": STEPS + 1,
        "max_seq_length": LENGTH,
        "val_batches": 0,
    }
    cases = [
        replace(
            case,
            train={**case.train, **quiet},
            length=LENGTH,
            writes_gradients=False,
        )
        for case in CASES
    ]
    data_parallel = replace(cases[0], name="data-parallel", shard=None)
    run(tmp_path, tmp_path / "ring", 2, *cases, data_parallel)
    for case in (*cases, data_parallel):
        # Before each update, the processes compare shapes: 65 pairs of four bytes. The
        # plan leaves them out; they are 2 % of what the smallest case sends.
        compared = 520 if case.shard else 0
        sent, planned = sent_and_planned(case, tmp_path / "ring", make_tiny_folder)
        assert sent - compared == pytest.approx(planned, rel=0.05), case.name
