"""Training with tensor parallelism: every process has the whole batch."""

import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.processes import run as run_alone
from tests.train import ring
from tests.train.killed import PLAIN, assert_same_run
from tests.train.sharded import Case
from tests.train.test_sharded import compare, run, sent_and_planned

# Heads and widths that four processes divide, and groups of a packed row too.
WIDE = {"num_attention_heads": 4, "num_key_value_heads": 4, "hidden_size": 128}
WIDE |= {"intermediate_size": 256}
BIASED = {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}
# Adam amplifies rounding from step to step; a smaller rate keeps it below the bound.
RATE = {"learning_rate": 3e-4}
CASES = (
    Case(
        name="dense-dora-tied",
        model=WIDE,
        shard="tensor",
        train=RATE,
        dora={"keys": None, "dropout": 0.25},
    ),
    Case(
        name="packed-dora-untied",
        bits=4,
        model=WIDE | BIASED,
        shard="tensor",
        train={**RATE, "grad_checkpoint": True},
        dora={"num_layers": 1},
    ),
    Case(
        name="dense-lora-untied",
        model=WIDE | BIASED,
        shard="tensor",
        train={**RATE, "fine_tune_type": "lora", "grad_accumulation_steps": 2},
    ),
    Case(
        name="packed-lora-tied",
        bits=4,
        model=WIDE,
        shard="tensor",
        train={**RATE, "fine_tune_type": "lora", "packing": True},
    ),
    Case(
        name="packed-dora-head",
        bits=4,
        model=WIDE,
        shard="tensor",
        train=RATE,
        dora={"keys": ["self_attn.q_proj", "mlp.down_proj", "model.embed_tokens"]},
    ),
)


@pytest.mark.parametrize(
    ("processes", "cases"),
    [
        pytest.param(2, CASES[:1], id="two"),
        pytest.param(2, CASES[1:2], id="two-packed"),
        pytest.param(2, CASES[2:], id="two-others", marks=pytest.mark.slow),
        pytest.param(4, CASES[:1], id="four", marks=pytest.mark.slow),
        pytest.param(4, CASES[1:], id="four-others", marks=pytest.mark.slow),
    ],
)
def test_losses_and_gradients_equal_those_of_a_single_process(
    tmp_path: Path, processes: int, cases: tuple[Case, ...]
) -> None:
    compare(tmp_path, processes, cases)


LENGTH = 25


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's counts of TCP")
@pytest.mark.parametrize(
    "cases",
    [CASES[1:2], pytest.param((CASES[0], *CASES[2:]), marks=pytest.mark.slow)],
    ids=["packed", "others"],
)
def test_what_a_step_sends_is_what_the_plan_says(
    make_tiny_folder: Callable[..., Path], tmp_path: Path, cases: tuple[Case, ...]
) -> None:
    quiet = {
        "steps_per_report": 6,
        "steps_per_eval": 6,
        "max_seq_length": LENGTH,
        "iters": 6,
        "val_batches": 0,
    }
    measured = [
        replace(
            case,
            train={**case.train, **quiet, "packing": False},
            length=LENGTH,
            writes_gradients=False,
        )
        for case in cases
    ]
    run(tmp_path, tmp_path / "ring", 2, *measured)
    for case in measured:
        sent, planned = sent_and_planned(case, tmp_path / "ring", make_tiny_folder)
        assert sent == pytest.approx(planned, rel=0.05), case.name


@pytest.mark.compiled
def test_compiled_steps_equal_those_of_a_single_process(tmp_path: Path) -> None:
    few = {"iters": 5, "save_every": 5, "grad_checkpoint": True, "max_seq_length": 25}
    train = {**RATE, **few}
    case = replace(CASES[1], train=train, length=25, compiles=True)
    compare(tmp_path, 2, (replace(case, writes_gradients=False),))


@pytest.mark.slow
def test_killed_processes_resume_bit_for_bit_and_alone(tmp_path: Path) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "folder"
    for code, errors in ring.both(tmp_path, *[PLAIN.words(whole, shard="tensor")] * 2):
        assert code == 0, errors
    commands = [PLAIN.words(folder, shard="tensor")] * 2
    with ring.started(tmp_path, *commands) as processes:
        assert processes[0].stdout is not None
        for _ in range(5):  # updates of two batches; saved at batches 4 and 8
            assert processes[0].stdout.readline()
        for process in processes:
            process.send_signal(signal.SIGKILL)
    resumed = PLAIN.words(folder, shard="tensor", resume=True)
    for code, errors in ring.both(tmp_path, resumed, resumed):
        assert code == 0, errors
    assert_same_run(whole, folder)
    alone = run_alone(PLAIN.words(folder, resume=True, iters=30))
    assert alone.returncode == 0
    assert "processes was 2, is 1; shard was" in alone.stderr
    assert "up to rounding, not bit for bit" in alone.stderr
