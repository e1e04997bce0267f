"""GRPO's losses and gradients against TRL's, on the same batch of SmolLM2."""

import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_dora import DoRAConfig, apply_dora, load, save_adapter
from mlx_dora.evaluate.log_probabilities import row_log_probs
from mlx_dora.peft import to_peft
from mlx_dora.train.grpo.config import RewardConfig
from mlx_dora.train.objectives.grpo import Grpo
from mlx_dora.train.objectives.reference import Reference
from tests.checks import relative_rms
from tests.compat.peer_process import peers_python, run_peer

GRADIENTS = 1e-4
"""Bound of the gradients' relative error, over the whole adapter."""
TEMPERATURE = 0.8
LONGEST = 9  # max_completion_length
# Of equal length: TRL pads prompts on the left and leaves the positions to start
# there, which rounds differently.
PROMPTS = [
    "Question: which is larger, 64 or 89?\nAnswer:",
    "Question: which is larger, 37 or 20?\nAnswer:",
]
COMPLETIONS = [" 89.\n", " 64 is larger than", " 37", " It is a very easy one"]
CASES: list[dict[str, Any]] = [
    {"loss_type": name, "is_later": later, **settings}
    for name in ("grpo", "bnpo", "dr_grpo", "dapo")
    for later, settings in [
        (False, {}),
        (True, {"epsilon_high": 0.28, "beta": 0.04}),
        (True, {"delta": 1.2, "beta": 0.1, "use_bias_correction_kl": False}),
    ]
] + [
    {"loss_type": "grpo", "is_later": True, "importance_sampling_level": "sequence"}
]  # fmt: skip


def padded(rows: list[list[int]], *, left: bool) -> tuple[mx.array, mx.array]:
    """Rows as an array with a mask, padded on one side."""
    width = max(map(len, rows))
    tokens, mask = np.zeros((len(rows), width), int), np.zeros((len(rows), width), int)
    for at, row in enumerate(rows):
        here = slice(width - len(row), None) if left else slice(0, len(row))
        tokens[at, here], mask[at, here] = row, 1
    return mx.array(tokens), mx.array(mask)


def adapted(folder: Path) -> tuple[nn.Module, Any]:
    model: Any
    model, tokenizer = load(folder)
    apply_dora(model, DoRAConfig(rank=4, scale=4.0, num_layers=2))
    mx.random.seed(0)
    flat: Any = tree_flatten(model.trainable_parameters())
    for name, value in flat:
        size = 0.02 if name.endswith("lora_b") else 0.0
        size = 0.05 * float(value.mean()) if name.endswith(".m") else size
        noise = size * mx.random.normal(value.shape)
        model.load_weights([(name, value + noise)], strict=False)
    return model, tokenizer


@pytest.mark.slow
@pytest.mark.real_model
def test_losses_and_gradients_are_trls(smollm: Path, tmp_path: Path) -> None:
    peers_python("torch", "peft", "transformers", "trl", "datasets")
    model, tokenizer = adapted(smollm)
    save_adapter(model, tmp_path / "adapter")
    to_peft(
        tmp_path / "adapter", tmp_path / "peft", base_model_name_or_path=str(smollm)
    )
    prompts = [tokenizer.encode(text) for text in PROMPTS for _ in range(2)]
    answers = [tokenizer.encode(text, add_special_tokens=False) for text in COMPLETIONS]
    tokens, _ = padded(
        [p + a for p, a in zip(prompts, answers, strict=True)], left=False
    )
    marks = mx.array(
        [(len(p), len(p) + len(a)) for p, a in zip(prompts, answers, strict=True)]
    )
    # Not balanced, so that a relative error of the loss, a sum of both signs, is one of
    # its terms.
    gains = mx.array([0.9, -0.4, 1.3, -0.2])
    model.eval()
    with_adapter = log_probs(model, tokens, marks)
    with Reference().standing_in(model):
        reference = log_probs(model, tokens, marks)
    chance = np.random.default_rng(1)
    # In the losses, each side's other policies are its own of now, moved by the same
    # noise, so that the rounding of two forward passes does not enter their ratios.
    noises = {
        name: mx.array(chance.normal(scale=0.25, size=tokens[:, 1:].shape))
        for name in ("old", "reference")
    }
    noises = {name: noise.astype(mx.float32) for name, noise in noises.items()}
    given = dict(
        zip(("prompt_ids", "prompt_mask"), padded(prompts, left=True), strict=True)
    )
    given |= dict(
        zip(
            ("completion_ids", "completion_mask"),
            padded(answers, left=False),
            strict=True,
        )
    )
    given |= {"advantages": gains}
    given |= {n: of_completions(v, prompts, answers) for n, v in noises.items()}
    job = {
        "model": str(smollm),
        "adapter": str(tmp_path / "peft"),
        "cases": CASES,
        "temperature": TEMPERATURE,
        "max_completion_length": LONGEST,
    }
    found = run_peer("grpo_peer.py", "loss", tmp_path / "peer", job, given)
    mask = np.array(given["completion_mask"]) > 0
    for name, ours in {"logps": with_adapter, "reference": reference}.items():
        own = np.array(of_completions(ours, prompts, answers))[mask]
        # Thirty blocks of float32 in two orders of summation.
        error = relative_rms(own, np.array(found[name])[mask])
        sys.stderr.write(f"{name}: {error:.1e}\n")
        assert error < 5e-5, name
    model.train()
    for number, case in enumerate(CASES):
        old, other = (with_adapter + noise for noise in noises.values())
        check(model, number, case, (tokens, marks, gains), old, other, found)


def check(
    model: nn.Module,
    number: int,
    case: dict[str, Any],
    batch: tuple[mx.array, ...],
    old: mx.array,
    reference: mx.array,
    found: dict[str, mx.array],
) -> None:
    """Compare the loss and the gradient of a case."""
    settings = {name: value for name, value in case.items() if name != "is_later"}
    objective = Grpo(
        RewardConfig(
            reward_funcs=("exact_match",),
            max_completion_length=LONGEST,
            temperature=TEMPERATURE,
            num_iterations=2 if case["is_later"] else 1,
            **settings,
        )
    )
    more = [old] * case["is_later"] + [reference] * ("beta" in case)
    table = mx.zeros((len(objective.metrics), 2))

    def loss(*arrays: mx.array) -> mx.array:
        return objective.loss(model, *arrays)[0]

    value, gradient = nn.value_and_grad(model, loss)(*batch, table, *more)
    expected = float(found[f"{number}.loss"])
    assert float(value) == pytest.approx(expected, rel=1e-5), case
    flat: Any = tree_flatten(gradient)
    assert len(flat) == sum(name.startswith(f"{number}.base") for name in found)
    ours, theirs = [], []
    for name, slope in flat:
        path, _, leaf = name.rpartition(".")
        their_leaf = {
            "lora_a": "lora_A.default.weight",
            "lora_b": "lora_B.default.weight",
            "m": "lora_magnitude_vector.default.weight",
        }[leaf]
        wanted = np.array(found[f"{number}.base_model.model.{path}.{their_leaf}"])
        own = np.array(slope) if leaf == "m" else np.array(slope).T
        ours.append(own.ravel())
        theirs.append(wanted.ravel())
    error = relative_rms(np.concatenate(ours), np.concatenate(theirs))
    sys.stderr.write(f"{case}: loss {float(value):.6f}, gradient {error:.1e}\n")
    assert error < GRADIENTS, case


def log_probs(model: nn.Module, tokens: mx.array, marks: mx.array) -> mx.array:
    found = row_log_probs(model, tokens, marks, gradient=False, temperature=TEMPERATURE)
    mx.eval(found.each)
    return found.each


def of_completions(
    values: mx.array, prompts: list[list[int]], answers: list[list[int]]
) -> mx.array:
    """The values at the completions' tokens, padded on the right."""
    width = max(map(len, answers))
    rows = np.zeros((len(answers), width), np.float32)
    for at, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        start = len(prompt) - 1  # position t predicts token t + 1
        rows[at, : len(answer)] = np.array(values)[at, start : start + len(answer)]
    return mx.array(rows)
