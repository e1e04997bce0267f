"""Killed and resumed runs, compared with uninterrupted runs."""

import hashlib
import json
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_dora.errors import DoRAError
from mlx_dora.train.run.checkpoint import newest_checkpoint
from tests.train.conftest import EXAMPLES
from tests.train.killed import PLAIN, assert_same_run, lines
from tests.train.saved import same_bits, tensors

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole") / "adapter"
    PLAIN.finish(folder)
    return folder


def test_kills_at_random_moments_change_nothing(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    PLAIN.kill_at_random(folder, (3, 4), 0.05, random.Random(0))
    assert_same_run(whole, folder)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_many_kills_at_random_moments_change_nothing(
    whole: Path, tmp_path: Path, seed: int
) -> None:
    folder = tmp_path / "adapter"
    chance = random.Random(seed)
    steps = [chance.randrange(1, 8) for _ in range(3)]
    PLAIN.kill_at_random(folder, steps, 0.1, chance)
    assert_same_run(whole, folder)


MOMENTS = (
    "weights written",
    "before state",
    "before rename",
    "after rename",
    "before prune",
)


@pytest.mark.parametrize(
    ("moment", "count"),
    [
        pytest.param(moment, count, marks=[pytest.mark.slow] if count != 3 else [])
        for moment in MOMENTS
        for count in (1, 3)
        if (moment, count) not in {("after rename", 3), ("before prune", 3)}
    ],
)
def test_a_kill_inside_a_write_changes_nothing(
    whole: Path, tmp_path: Path, moment: str, count: int
) -> None:
    folder = tmp_path / "adapter"
    process = PLAIN.start(folder, die=[moment, count])
    process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL
    PLAIN.finish(folder, resume=True)
    assert_same_run(whole, folder)
    left = [p.name for p in (folder / "checkpoints").iterdir() if p.name != ".lock"]
    assert sorted(left) == ["20", "24"]


def test_an_extended_run_equals_the_longer_run(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    PLAIN.finish(folder, iters=13)  # its last update has one batch instead of two
    PLAIN.finish(folder, resume=True)
    assert_same_run(whole, folder)


def test_resuming_a_finished_run_changes_nothing(run: Run, tmp_path: Path) -> None:
    _, report = run(iters=6, save_every=3, valid=EXAMPLES)
    before, text = tensors(report.adapter_path), lines(report.adapter_path)
    mx.eval(before)
    _, again = run(iters=6, save_every=3, valid=EXAMPLES, resume=True)
    assert again.steps == 6
    assert same_bits(before, tensors(again.adapter_path))
    assert lines(again.adapter_path) == text


def test_changed_settings_are_refused_with_a_list(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"iters": 4, "save_every": 2}
    run(**settings)
    changed = {**settings, "iters": 8, "learning_rate": 1e-3, "rank": 2}
    with pytest.raises(DoRAError) as caught:
        run(**changed, resume=True)
    text = str(caught.value)
    assert "learning_rate was 0.01, is 0.001" in text
    assert "adapter.rank was 4, is 2" in text
    assert "iters" not in text
    with pytest.raises(DoRAError, match="training data was"):
        run(**settings, data=EXAMPLES[:-1], resume=True)
    _, report = run(
        **{**settings, "iters": 8, "learning_rate": 1e-3}, resume=True, force=True
    )
    assert report.steps == 8
    assert "continuing with changed settings: " in caplog.text


def test_a_damaged_checkpoint_is_named_and_skipped(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    _, whole = run("whole", iters=8, save_every=2)
    _, report = run(iters=6, save_every=2)
    broken = report.adapter_path / "checkpoints" / "6" / "optimizer.safetensors"
    content = bytearray(broken.read_bytes())
    content[-3] ^= 1
    broken.write_bytes(content)
    _, again = run(iters=8, save_every=2, resume=True)
    assert "checkpoints/6 is damaged" in caplog.text
    assert same_bits(tensors(whole.adapter_path), tensors(again.adapter_path))
    assert lines(whole.adapter_path) == lines(again.adapter_path)


@pytest.mark.parametrize(
    "damage", ["", "{}", '{"version": 9}', "[]", "[" * 100_000, '{"version": 1}']
)
def test_a_damaged_state_is_skipped(
    run: Run, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    _, report = run(iters=4, save_every=2)
    (report.adapter_path / "checkpoints" / "4" / "state.json").write_text(damage)
    newest = newest_checkpoint(report.adapter_path, multiple_of=1)
    assert newest is not None
    assert newest.state.step == 2
    assert "checkpoints/4 is damaged" in caplog.text


@pytest.mark.parametrize("name", ["²", "007", "9" * 30, "x", ".4"])
def test_folders_not_named_like_checkpoints_are_ignored(run: Run, name: str) -> None:
    _, report = run(iters=2, save_every=2)
    other = report.adapter_path / "checkpoints" / name
    other.mkdir()
    newest = newest_checkpoint(report.adapter_path, multiple_of=1)
    assert newest is not None
    assert newest.state.step == 2


def replace_file(checkpoint: Path, name: str, content: bytes) -> None:
    """Replace a tensor file and its digest, as an attacker would."""
    (checkpoint / name).write_bytes(content)
    state = json.loads((checkpoint / "state.json").read_text())
    state["sha256"][name] = hashlib.sha256(content).hexdigest()
    (checkpoint / "state.json").write_text(json.dumps(state))


@pytest.mark.parametrize("name", ["adapters.safetensors", "optimizer.safetensors"])
def test_a_file_that_mlx_cannot_read_is_skipped(
    run: Run, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    _, report = run(iters=4, save_every=2)
    replace_file(report.adapter_path / "checkpoints" / "4", name, b"not tensors")
    newest = newest_checkpoint(report.adapter_path, multiple_of=1)
    assert newest is not None
    assert newest.state.step == 2
    assert "is not a valid safetensors file" in caplog.text


def test_weights_that_are_not_finite_are_skipped(
    run: Run, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    _, report = run(iters=4, save_every=2)
    checkpoint = report.adapter_path / "checkpoints" / "4"
    weights = mx.load(str(checkpoint / "adapters.safetensors"))
    assert isinstance(weights, dict)
    broken = {name: value * mx.nan for name, value in weights.items()}
    mx.save_safetensors(str(tmp_path / "w.safetensors"), broken)
    content = (tmp_path / "w.safetensors").read_bytes()
    replace_file(checkpoint, "adapters.safetensors", content)
    newest = newest_checkpoint(report.adapter_path, multiple_of=1)
    assert newest is not None
    assert newest.state.step == 2
    assert "holds NaN or inf" in caplog.text


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda log: log[:50] + b"\xff" + log[51:], "line 1 is not JSON"),
        (lambda log: b"\0" * 64 + log[64:], "line 1 is not JSON"),
        (lambda log: b"null\n" * (len(log) // 5 + 1), "must hold a JSON object"),
        (lambda log: log.replace(b'"step"', b'"stop"'), "'stop' is unknown; step is"),
        (lambda log: log.replace(b'"step": ', b'"step": -'), "step must be"),
    ],
)
def test_a_damaged_log_is_named_with_its_line(
    run: Run, damage: Callable[[bytes], bytes], reason: str
) -> None:
    _, report = run(iters=4, save_every=2)
    log = report.adapter_path / "log.jsonl"
    log.write_bytes(damage(log.read_bytes()))
    with pytest.raises(DoRAError, match=reason) as caught:
        run(iters=6, save_every=2, resume=True)
    assert "log.jsonl, line 1" in str(caught.value)


def test_a_second_training_in_the_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    process = PLAIN.start(folder, iters=100_000, save_every=2)
    try:
        assert process.stdout is not None
        while not (folder / "checkpoints" / "2").exists():
            assert process.stdout.readline()
        second = PLAIN.start(folder, iters=100_000, save_every=2, resume=True)
        _, errors = second.communicate(timeout=60)
        assert second.returncode == 1
        assert "another training is running in" in errors
    finally:
        process.kill()
        process.communicate()


def test_training_in_a_used_folder_is_refused_or_starts_over(run: Run) -> None:
    _, report = run(iters=4, save_every=2)
    with pytest.raises(DoRAError, match="resume it"):
        run(iters=4)
    (report.adapter_path / "adapters.safetensors").unlink()
    with pytest.raises(DoRAError, match="holds checkpoints of a training"):
        run(iters=4)
    run(iters=3, overwrite=True)
    names = {path.name for path in (report.adapter_path / "checkpoints").iterdir()}
    assert names == {"3", ".lock"}


def test_resume_without_a_checkpoint_says_so(
    run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, report = run(iters=2, resume=True)
    assert report.steps == 2
    assert "has no checkpoint: training starts at step 0" in caplog.text
    for path in (report.adapter_path / "checkpoints").iterdir():
        if path.is_dir():
            path.rename(tmp_path / path.name)
    with pytest.raises(DoRAError, match="no checkpoint to resume from"):
        run(iters=2, resume=True)
