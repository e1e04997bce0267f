"""A choice among merges, by what they do to two tiny tasks."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest

from mlx_dora import DoRAConfig, DoRAError, load, load_adapter, save_adapter
from mlx_dora.adapters.attach import attach_adapter
from mlx_dora.adapters.surgery import apply_dora
from mlx_dora.data.batches import pad_batch
from mlx_dora.evaluate.loss import loss_fn
from mlx_dora.merge import merge_adapters
from mlx_dora.merge.choice import Candidate, MergeChoice, choose_merge
from mlx_dora.merge.choice.candidates import default_candidates
from mlx_dora.merge.choice.result import TaskRows, Trial
from tests.checks import assert_close
from tests.processes import run

TASKS = {"colors": "red green blue", "numbers": "seven eight nine"}
TEMPLATE = "What does {} return?"


def write_task(folder: Path, answers: str, split: str = "valid") -> Path:
    """Write 9 rows whose answers are one of three words."""
    folder.mkdir()
    words = answers.split()
    rows = [
        {"prompt": TEMPLATE.format(answers[i] * (i + 1)), "completion": words[i % 3]}
        for i in range(9)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / f"{split}.jsonl").write_text(text)
    return folder


def chat(row: dict[str, str], tokenizer: Any) -> tuple[list[int], int]:
    """Tokens of a row, and the index of its first target."""
    messages = [{"role": "user", "content": row["prompt"]}]
    prompt = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    messages.append({"role": "assistant", "content": row["completion"]})
    return tokenizer.apply_chat_template(messages, return_dict=False), len(prompt)


def rows_of(task: Path, tokenizer: Any) -> list[tuple[list[int], int]]:
    lines = next(task.iterdir()).read_text().splitlines()
    return [chat(json.loads(line), tokenizer) for line in lines]


def trained(base: Path, task: Path, save_path: Path, seed: int) -> Path:
    """Train an adapter on the rows of a task."""
    model, tokenizer = load(base)
    mx.random.seed(seed)
    apply_dora(model, DoRAConfig(rank=2, scale=4.0, num_layers=2))
    batch = pad_batch(rows_of(task, tokenizer), 512)
    adam = optim.Adam(0.02, bias_correction=True)
    step = nn.value_and_grad(model, lambda *b: loss_fn(model, *b)[0])
    for _ in range(25):
        _, gradients = step(*batch)
        adam.update(model, gradients)
        mx.eval(model.parameters(), adam.state)
    save_adapter(model, save_path, base_model=str(base))
    return save_path


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the adapters of the first test are kept for the others."""
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture
def material(tiny_model_folder: Path, tmp_path: Path, kept: Path) -> dict[str, Any]:
    tasks = [write_task(tmp_path / name, words) for name, words in TASKS.items()]
    adapters = []
    for seed, task in enumerate(tasks):
        if not (kept / task.name).exists():
            trained(tiny_model_folder, task, kept / task.name, seed)
        adapters.append(tmp_path / f"for_{task.name}")
        shutil.copytree(kept / task.name, adapters[-1])
    return {"base": tiny_model_folder, "tasks": tasks, "adapters": adapters}


def choose(material: dict[str, Any], **more: Any) -> MergeChoice:
    return choose_merge(
        [*map(str, material["adapters"])],
        model=str(material["base"]),
        data=[*map(str, material["tasks"])],
        **more,
    )


def numpy_loss(model: nn.Module, rows: list[tuple[list[int], int]]) -> float:
    """Mean loss of the targets, in float64."""
    total, count = 0.0, 0
    for tokens, first in rows:
        logits = np.array(model(mx.array([tokens]))[0].astype(mx.float32), np.float64)
        for place in range(first, len(tokens)):
            row = logits[place - 1]
            top = row.max()
            total += top + np.log(np.exp(row - top).sum()) - row[tokens[place]]
            count += 1
    return total / count


def test_every_trial_has_the_loss_of_its_merge(material: dict[str, Any]) -> None:
    choice = choose(material)
    model, tokenizer = load(material["base"])
    rows = [rows_of(task, tokenizer) for task in material["tasks"]]
    base = [numpy_loss(model, task) for task in rows]
    assert choice.base == pytest.approx(base, rel=1e-5)
    own = []
    for adapter in material["adapters"]:
        fresh, _ = load(material["base"], adapter)
        own.append([numpy_loss(fresh, task) for task in rows])
    assert np.allclose(choice.alone, own, rtol=1e-5)
    possible = [base[t] - min(losses[t] for losses in own) for t in range(2)]
    scores = []
    for trial in choice.trials:
        assert not trial.error
        candidate = trial.candidate
        merged = merge_adapters(
            material["adapters"],
            model=material["base"],
            method=candidate.method,
            weights=candidate.weights,
            density=candidate.density,
            space=candidate.space,
        )
        fresh, _ = load(material["base"])
        attach_adapter(fresh, merged)
        losses = [numpy_loss(fresh, task) for task in rows]
        assert trial.losses == pytest.approx(losses, rel=1e-5)
        scores.append(min((base[t] - losses[t]) / possible[t] for t in range(2)))
    assert len(scores) > len(default_candidates(2))
    assert choice.best is choice.trials[int(np.argmax(scores))]
    assert choice.score(choice.best) == pytest.approx(max(scores), rel=1e-4)
    assert max(scores) > 0.3  # the tasks gain


def test_the_same_input_gives_the_same_choice(material: dict[str, Any]) -> None:
    random = [
        Candidate(method="dare", weights=(1.0, 1.0), density=0.5),
        Candidate(method="slerp", weights=(0.5, 0.5)),
    ]
    first, again, other = (
        choose(material, candidates=random, rows=3, seed=seed) for seed in (0, 0, 1)
    )
    assert first.to_dict() == again.to_dict()
    assert first.trials[0].losses != other.trials[0].losses
    assert [task.rows for task in first.tasks] == [3, 3]


def test_a_failed_candidate_is_named_with_its_reason(material: dict[str, Any]) -> None:
    bad = Candidate(method="ties", weights=(0.5, 0.5), density=1.5)
    good = Candidate(method="karcher", weights=(0.5, 0.5))
    choice = choose(material, candidates=[bad, good], rows=2)
    assert "density must be" in choice.trials[0].error
    text = "\n".join(choice.lines())
    assert any(line.startswith(f"{bad.name}: ") for line in choice.lines()), text
    assert f"1 of {len(choice.trials)} candidates failed." in text
    entry = json.loads(json.dumps(choice.to_dict()))["trials"][0]
    assert (entry["losses"], entry["worst_share"]) == ([], None)
    assert "density must be" in entry["error"]
    with pytest.raises(DoRAError, match=r"no candidate could be merged: ties.*density"):
        choose(material, candidates=[bad], rows=2)


def test_weights_move_towards_the_task_that_gains_least(
    material: dict[str, Any],
) -> None:
    slight = Candidate(method="linear", weights=(0.95, 0.05))
    choice = choose(material, candidates=[slight])
    assert choice.worst_task(choice.trials[0]) == 1
    second = choice.trials[1].candidate
    assert second == slight.tilted(1)
    assert second.weights == pytest.approx((0.95 / 1.025, 0.075 / 1.025), abs=1e-4)
    assert choice.score(choice.trials[1]) > choice.score(choice.trials[0])
    assert choice.best is not choice.trials[0]


def test_rows_come_from_validation_then_test_data(material: dict[str, Any]) -> None:
    write_task(material["base"].parent / "only", TASKS["colors"], "test")
    material["tasks"][1] = material["base"].parent / "only"
    tasks = choose(material, candidates=default_candidates(2)[:1]).tasks
    assert [(task.name, task.split) for task in tasks] == [
        ("colors", "valid"),
        ("only", "test"),
    ]


def made(losses: tuple[float, ...]) -> MergeChoice:
    tasks = tuple(TaskRows(name=name, split="valid", rows=4, tokens=9) for name in "xy")
    candidate = Candidate(method="slerp", weights=(0.5, 0.5))
    return MergeChoice(
        adapters=("a", "b"),
        tasks=tasks,
        base=(4.0, 10.0),
        alone=((2.0, 12.0), (5.0, 0.0)),
        trials=(Trial(candidate=candidate, losses=losses),),
    )


def test_a_gain_is_a_share_of_what_the_best_adapter_gains() -> None:
    choice = made((3.0, 4.0))
    assert choice.shares((3.0, 4.0)) == pytest.approx([0.5, 0.6])
    assert choice.score(choice.best) == pytest.approx(0.5)
    assert choice.warnings() == []
    useless = replace(choice, alone=((5.0, 0.0),))
    assert useless.shares((3.96, 4.0))[0] == pytest.approx(1.0)  # 1 % of the base


def test_a_choice_above_the_base_is_said() -> None:
    (warning,) = made((4.5, 4.0)).warnings()
    assert "4.5000 on x, above the base's 4.0000" in warning
    assert made((4.5, 4.0)).to_dict()["above_base"] == ["x"]


def test_bad_arguments_are_refused(material: dict[str, Any]) -> None:
    with pytest.raises(DoRAError, match="at least two adapters"):
        choose_merge(material["adapters"][:1], model="x", data=["y"])
    with pytest.raises(DoRAError, match="rows must be at least 1, got 0"):
        choose(material, rows=0)
    material["tasks"] = [material["base"] / "nothing"]
    with pytest.raises(DoRAError, match="nothing"):
        choose(material)


def merge(material: dict[str, Any], *more: object, out: str = "out") -> Any:
    data = [word for task in material["tasks"] for word in ("--data", task)]
    words = ["-m", "mlx_dora", "merge", "adapters", *material["adapters"]]
    save_path = material["base"].parent / out
    return run([*words, "--method", "auto", *data, "--save-path", save_path, *more])


def test_the_command_saves_the_merge_that_it_chose(material: dict[str, Any]) -> None:
    done = merge(material, "--rows", 9, "--json", "-")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    chosen = found["choice"]["chosen"]
    assert found["method"] == chosen["method"]
    expected = merge_adapters(material["adapters"], model=material["base"], **chosen)
    saved = load_adapter(material["base"].parent / "out")
    assert saved.tensors.keys() == expected.tensors.keys()
    for name, value in expected.tensors.items():
        assert_close(saved.tensors[name], np.array(value), bound=1e-4)  # other BLAS
    shown = merge(material, out="again").stdout
    assert f"Chosen: {chosen['method']}" in shown
    assert "9 valid rows of colors" in shown
    for name in ("base", "for_colors alone", "task_arithmetic, weights 1,1"):
        assert any(line.startswith(name) for line in shown.splitlines())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--weights", "1,2"], "chooses the settings"),
        (["--density", "0.2"], "chooses the settings"),
        (["--rows", "0"], "0"),
        (["--method", "linear"], "--data needs --method auto"),
    ],
)
def test_settings_that_auto_chooses_are_refused(
    tmp_path: Path, words: list[str], message: str
) -> None:
    nothing = {"tasks": ["data"], "adapters": ["a", "b"], "base": tmp_path / "base"}
    done = merge(nothing, *words)
    assert done.returncode == 2
    assert message in done.stderr
