"""GRPO trainings of a tiny model: what is learned, refused, logged and shared."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_dora import DoRAConfig, DoRASwitchLinear
from mlx_dora.errors import DoRAError
from mlx_dora.train import TrainConfig, TrainReport, finetune
from mlx_dora.train.grpo.config import RewardConfig
from mlx_dora.train.objectives.grpo import Grpo
from tests.adapters.stacks import make_model
from tests.train.grpo.letters import PROMPTS, Letters
from tests.train.saved import log, same_bits, tensors

PARITY = "tests.train.grpo.letters.parity"
EVEN = [{**row, "wanted": 0} for row in PROMPTS]
Run = Callable[..., tuple[nn.Module, TrainReport]]


@pytest.fixture
def grpo(make_tiny_model: Callable[..., nn.Module], tmp_path: Path) -> Run:
    """Train a tiny model: ``grpo("name", iters=3, reward={...}, dora={...})``."""

    def call(
        name: str = "adapter",
        *,
        model: nn.Module | None = None,
        data: Any = PROMPTS,
        valid: Any = None,
        reward: dict[str, Any] | None = None,
        dora: dict[str, Any] | None = None,
        **settings: Any,
    ) -> tuple[nn.Module, TrainReport]:
        given = {"iters": 3, "batch_size": 2, "learning_rate": 1e-2, **settings}
        model = make_tiny_model(vocab_size=64) if model is None else model
        rewards = {"reward_funcs": (PARITY,), "num_generations": 4}
        report = finetune(
            model,
            Letters(),
            data,
            valid,
            train=TrainConfig(objective="grpo", max_seq_length=32, **given),
            dora=DoRAConfig(
                **{"rank": 4, "scale": 2.0, "num_layers": -1, **(dora or {})}
            ),
            adapter_path=tmp_path / name,
            reward=RewardConfig(
                **{**rewards, "max_completion_length": 6, **(reward or {})}
            ),
        )
        return model, report

    return call


def samples(report: TrainReport) -> list[dict[str, Any]]:
    text = (report.adapter_path / "samples.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_training_raises_the_reward_and_keeps_the_best_adapter(grpo: Run) -> None:
    _, report = grpo(
        iters=20,
        steps_per_eval=5,
        batch_size=4,
        data=EVEN,
        valid=EVEN,
        learning_rate=1e-2,
        reward={"num_generations": 8},
    )
    rewards = [
        (line.step, line.metrics["reward"], line.val_loss)
        for line in report.history
        if line.val_loss is not None and line.metrics is not None
    ]
    assert rewards[-1][1] > rewards[0][1] + 0.1
    assert all(loss == -reward for _, reward, loss in rewards)
    best = max((reward, -step) for step, reward, _ in rewards[1:])
    assert report.best_step == -best[1]
    saved = json.loads((report.adapter_path / "best/adapter_config.json").read_text())
    assert saved["mlx_dora"]["training"]["steps"] == report.best_step
    assert saved["mlx_dora"]["training"]["rewards"] == {PARITY: 1.0}


def test_the_log_holds_what_the_samples_say(grpo: Run) -> None:
    _, report = grpo(
        iters=2,
        data=PROMPTS[:4],
        steps_per_report=1,
        reward={"scale_rewards": "none"},
    )
    found = samples(report)
    assert len(found) == 2 * 2 * 4
    for line in (line for line in report.history if line.train_loss is not None):
        own = [row for row in found if row["step"] == line.step - 1]
        metrics = line.metrics or {}
        rewards = np.array([row["reward"] for row in own])
        assert metrics["reward"] == pytest.approx(rewards.mean(), rel=1e-5)
        assert metrics["reward_std"] == pytest.approx(rewards.std(ddof=1), rel=1e-5)
        tokens = [row["tokens"] for row in own]
        assert metrics["completions/mean_length"] == pytest.approx(np.mean(tokens))
        cut = np.mean([not row["stopped"] for row in own])
        assert metrics["completions/clipped_ratio"] == pytest.approx(cut)
        gains = (rewards.reshape(2, 4) - rewards.reshape(2, 4).mean(1)[:, None]).ravel()
        assert [row["advantage"] for row in own] == pytest.approx(gains.tolist())
        # The policy that sampled is the current one: the loss is minus the mean
        # advantage of the tokens.
        mean = -np.average(gains, weights=tokens)
        assert line.train_loss == pytest.approx(mean, abs=1e-6)


@pytest.mark.parametrize(
    ("settings", "reward"),
    [
        ({"fine_tune_type": "lora"}, {"beta": 0.1}),
        ({"fine_tune_type": "full"}, {"beta": 0.1, "num_iterations": 2}),
        ({"dora": {"variant": "doran"}}, {}),
        ({"dora": {"variant": "map"}}, {"beta": 0.1}),
        ({"dora": {"dropout": 0.3}, "grad_checkpoint": True}, {"num_iterations": 3}),
    ],
)
def test_every_kind_of_training_changes_the_model(
    grpo: Run, settings: dict[str, Any], reward: dict[str, Any]
) -> None:
    _, report = grpo(
        iters=6, save_every=6, steps_per_report=6, reward=reward, **settings
    )
    line = next(line for line in report.history if line.train_loss is not None)
    assert line.metrics is not None
    assert ("kl" in line.metrics) == ("beta" in reward)
    assert line.metrics.get("kl", 1) > 0
    changed = tensors(report.adapter_path).values()
    assert all(bool(mx.isfinite(value).all()) for value in changed)
    assert not line.skipped_steps


def test_a_packed_base_is_trained(
    grpo: Run, make_tiny_model: Callable[..., nn.Module]
) -> None:
    base = make_tiny_model(vocab_size=64, bits=4)
    _, report = grpo(model=base, reward={"beta": 0.1})
    assert report.steps == 3


def test_an_earlier_adapter_can_be_the_reference(grpo: Run, tmp_path: Path) -> None:
    grpo("first", iters=8, learning_rate=3e-2)
    more = {"iters": 1, "resume_adapter_file": str(tmp_path / "first")}
    divergence = {}
    for name in (None, str(tmp_path / "first")):
        reward = {"beta": 0.1, "reference_adapter": name}
        _, report = grpo(f"to {name is None}", reward=reward, **more)
        line = next(line for line in report.history if line.train_loss is not None)
        divergence[name is None] = (line.metrics or {})["kl"]
    assert divergence[True] > 1e-3
    assert divergence[False] == pytest.approx(0, abs=1e-6)


def test_experts_are_trained(grpo: Run) -> None:
    model, report = grpo(model=make_model("mixtral"), reward={"beta": 0.1})
    assert report.steps == 3
    assert any(isinstance(m, DoRASwitchLinear) for m in model.modules())


def test_an_epoch_uses_each_prompt_in_every_pass(grpo: Run) -> None:
    _, report = grpo(iters=1, epochs=2, save_every=2, reward={"num_iterations": 2})
    assert report.steps == 2 * 3 * 2
    assert len(samples(report)) == 2 * len(PROMPTS) * 4
    _, cut = grpo(
        "cut",
        iters=3,
        grad_accumulation_steps=2,
        save_every=4,
        reward={"num_iterations": 2},
    )
    assert cut.steps == 3
    counted = [row["tokens"] for row in samples(cut)]
    assert len(counted) in (12, 16)
    assert cut.trained_tokens < 2 * sum(counted)


def test_completions_that_were_cut_can_be_left_out(grpo: Run) -> None:
    config = {"max_completion_length": 12, "mask_truncated_completions": True}
    _, report = grpo(reward=config, steps_per_report=1)
    lengths: dict[bool, list[int]] = {True: [], False: []}
    for row in samples(report):
        lengths[row["stopped"]].append(row["tokens"])
    assert lengths[False] == [12] * len(lengths[False])
    assert lengths[False]
    assert report.trained_tokens == sum(lengths[True]) > 0


def test_the_same_seed_gives_the_same_bits(grpo: Run) -> None:
    one, other = grpo("one")[1], grpo("other")[1]
    assert samples(one) == samples(other)
    assert same_bits(tensors(one.adapter_path), tensors(other.adapter_path))
    third = grpo("third", seed=1)[1]
    assert samples(third) != samples(one)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"packing": True}, "packing does not apply to objective grpo"),
        ({"batch_tokens": 64}, "batch_tokens does not apply"),
        ({"mask_prompt": True}, "mask_prompt does not apply"),
        ({"dora": {"variant": "bidora"}}, "variant bidora splits the rows"),
        (
            {"reward": {"reference_adapter": "x"}},
            "reference_adapter needs beta above 0",
        ),
        ({"reward": {"max_completion_length": 32}}, "leaves no room for a prompt in"),
        (
            {"reward": {"num_iterations": 2}, "save_every": 5},
            "save_every must be a multiple of .* 2, got 5",
        ),
        ({"reward": {"reward_funcs": ()}}, "grpo needs a reward"),
        (
            {"reward": {"reward_funcs": ("exact_match",)}},
            "reward exact_match needs 'answer'",
        ),
        (
            {"reward": {"max_completion_length": 27}},
            r"row 3: the prompt has 6 tokens, but max_seq_length 32 less .* leaves 5",
        ),
        ({"data": [{"text": "a"}]}, "row 0: expected the key 'prompt'; found 'text'"),
        ({"data": [*PROMPTS, {"prompt": "a"}]}, "expected the keys 'prompt', 'wanted'"),
        ({"data": [{"prompt": ""}]}, "'prompt' is empty"),
        (
            {"data": [{"prompt": "a", "wanted": 1, "completions": 2}]},
            "the column 'completions' would hide",
        ),
        (
            {"data": [{"prompt": [{"role": "assistant", "content": "a"}]}]},
            "'prompt' ends with an assistant's message",
        ),
        ({"data": ["abc"]}, "expected a mapping with the key 'prompt', got a str"),
    ],
)
def test_bad_settings_and_data_are_refused_before_anything_is_written(
    grpo: Run, tmp_path: Path, settings: dict[str, Any], reason: str
) -> None:
    with pytest.raises(DoRAError, match=reason) as caught:
        grpo(**settings)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "adapter").exists()


def test_a_reward_that_fails_ends_the_run_and_what_was_written_is_whole(
    grpo: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def fails_later(prompts: list[str], **columns: Any) -> list[float]:
        calls.append(prompts)
        return [float("nan") if len(calls) == 4 else 0.5 for _ in prompts]

    monkeypatch.setattr("tests.train.grpo.letters.parity", fails_later)
    pattern = r"^reward \S+parity returned nan for the prompt '[a-p]+': return a finite"
    with pytest.raises(DoRAError, match=pattern) as caught:
        grpo(iters=9, save_every=2, steps_per_report=1)
    assert "\n" not in str(caught.value)
    folder = tmp_path / "adapter"
    assert [line["step"] for line in log(folder)] == [1, 2, 3]
    rows = (folder / "samples.jsonl").read_text().splitlines()
    assert {json.loads(row)["step"] for row in rows} == {0, 1, 2}
    assert (folder / "checkpoints" / "2" / "state.json").exists()
    monkeypatch.undo()
    again = grpo(iters=4, save_every=2, steps_per_report=1, resume=True)[1]
    assert again.first_step == 2
    assert {row["step"] for row in samples(again)} == {0, 1, 2, 3}


def test_a_reward_that_fails_at_once_leaves_no_folder(
    grpo: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.train.grpo.letters.parity", lambda prompts: [1 / 0])
    with pytest.raises(DoRAError, match="ZeroDivisionError: division by zero, for the"):
        grpo(valid=PROMPTS)
    files = [path for path in (tmp_path / "adapter").rglob("*") if path.is_file()]
    assert [path.name for path in files] == [".lock"] or not files


def test_changed_data_columns_are_not_resumed(grpo: Run) -> None:
    grpo(iters=2, save_every=2)
    other = [{**row, "wanted": 1 - row["wanted"]} for row in PROMPTS]
    with pytest.raises(DoRAError, match="reward data was"):
        grpo(iters=4, save_every=2, data=other, resume=True)
    with pytest.raises(DoRAError, match=r"reward\.temperature was 1\.0, is 0.5"):
        grpo(iters=4, save_every=2, reward={"temperature": 0.5}, resume=True)


def test_a_checkpoint_of_another_objective_is_not_resumed(
    grpo: Run, make_tiny_model: Callable[..., nn.Module], tmp_path: Path
) -> None:
    finetune(
        make_tiny_model(vocab_size=64),
        None,
        [[1, 2, 3]] * 4,
        None,
        train=TrainConfig(iters=2, save_every=2, learning_rate=1e-2, batch_size=2),
        dora=DoRAConfig(rank=4, scale=2.0, num_layers=-1),
        adapter_path=tmp_path / "adapter",
    )
    with pytest.raises(DoRAError, match="reward data was null"):
        grpo(iters=4, save_every=2, resume=True)
    with pytest.raises(DoRAError, match="belongs to another objective: start over"):
        grpo(iters=4, save_every=2, resume=True, force=True)


def test_settings_of_grpo_need_its_objective(tiny_model: nn.Module) -> None:
    with pytest.raises(
        DoRAError, match="settings of grpo do not apply to objective sft"
    ):
        finetune(
            tiny_model,
            None,
            [[1, 2, 3]],
            None,
            train=TrainConfig(),
            dora=DoRAConfig(),
            adapter_path="unused",
            reward=RewardConfig(reward_funcs=("exact_match",)),
        )


def test_kernels_are_chosen_for_the_sizes_of_completions(
    grpo: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU each size of a step is measured before; here they are only listed."""
    asked: list[set[int]] = []

    def listed(model: nn.Module, sizes: list[int]) -> list[Any]:
        asked.append({*sizes})
        return []

    monkeypatch.setattr("mlx_dora.train.run.kernels.chosen_mode", lambda: "auto")
    monkeypatch.setattr("mlx_dora.train.run.kernels.training_cases", listed)
    used: set[int] = set()

    def note(self: Grpo, model: nn.Module, *batch: mx.array) -> Any:
        used.add(batch[0].shape[0] * (batch[0].shape[1] - 1))
        return real(self, model, *batch)

    real = Grpo.loss
    monkeypatch.setattr(Grpo, "loss", note)
    grpo(iters=6, reward={"max_completion_length": 20})
    assert len(used) > 1
    assert used <= asked[0]
