"""The measured choice on a pretended GPU whose times are injected."""

import json
import logging
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_dora import kernels
from mlx_dora.kernels import choice, kept, measure, trial
from mlx_dora.kernels.case import Case
from mlx_dora.kernels.measure import decide
from mlx_dora.kernels.trial import MARGIN
from tests.checks import to_numpy
from tests.kernels.device import Device, forget

NORM = Case("adapted_norm", mx.float32, 24, 32, 4)
SCALE = Case("dora_scale", mx.bfloat16, 24, 40, 4, has_offset=True, has_gradients=True)
CASES = [
    NORM,
    Case("adapted_norm", mx.bfloat16, 8, 64, 2, 4, 32),
    Case("normalize_rows", mx.float16, 8, 12),
    Case("fused_weight", mx.bfloat16, 8, 12, 2),
    SCALE,
    SCALE._replace(has_gradients=False, has_offset=False),
]


def file_of(device: Device) -> Path:
    return kept.kept_file()


def taken(cases: list[Case] = CASES) -> list[bool]:
    return [choice.takes_kernel(case, measure.job_of) for case in cases]


def test_a_case_that_was_not_measured_runs_plain_mlx(gpu: Device) -> None:
    assert taken() == [False] * len(CASES)
    weight = mx.random.normal((600, 600), key=mx.random.key(3))
    kernels.normalize_rows(weight)
    assert gpu.launches == {}


@pytest.mark.parametrize(("ratio", "is_faster"), [(0.5, True), (1.0, False)])
def test_the_faster_side_is_taken_for_every_op(
    gpu: Device, ratio: float, is_faster: bool
) -> None:
    gpu.ratio = lambda _: ratio
    decide(CASES)
    assert taken() == [is_faster] * len(CASES)


def test_no_op_is_slower_than_plain_mlx_by_the_log_of_choices(gpu: Device) -> None:
    """Whatever the times: nothing that auto takes costs over 2 % more than plain."""
    times = iter(np.random.default_rng(0).uniform(0.2, 3.0, 100).tolist())
    gpu.ratio = lambda _: next(times)
    points = [case for n in (1, 16, 100) for case in (SCALE.for_tokens(n), NORM)]
    decisions = decide([*CASES, *points])
    log = json.loads(file_of(gpu).read_text())["devices"]
    (measured,) = log.values()
    assert len(measured) == len(decisions.taken) >= 9
    for text, facts in measured.items():
        used = facts["kernel_us" if decisions.taken[text] else "plain_us"]
        assert used <= 1.02 * facts["plain_us"]
    assert 0 < sum(decisions.taken.values()) < len(measured)


@pytest.mark.parametrize("ratio", [1.0, 1 - MARGIN, 1 - MARGIN / 2])
def test_a_tie_goes_to_plain_mlx(gpu: Device, ratio: float) -> None:
    gpu.ratio = lambda _: ratio
    decide([NORM])
    assert taken([NORM]) == [False]


def test_a_chosen_kernel_runs_and_its_result_is_used(gpu: Device) -> None:
    weight = mx.random.normal((24, 32), key=mx.random.key(3))
    a, b = mx.ones((32, 4)), mx.ones((4, 24))
    decide([NORM])
    gpu.launches.clear()
    norm = kernels.adapted_norm(weight, a, b, 0.5)
    assert gpu.launches["adapted_norm"] == 1
    assert np.allclose(to_numpy(norm), np.linalg.norm(to_numpy(weight) + 2, axis=1))
    kernels.adapted_norm(weight, a[:, :3], b[:3], 0.5)  # another rank: not measured
    assert gpu.launches["adapted_norm"] == 1


def test_tokens_between_two_powers_of_two_take_the_kernel_where_both_do(
    gpu: Device,
) -> None:
    ratios = iter([0.5, 0.5, 1.5])
    gpu.ratio = lambda _: next(ratios)
    cases = [SCALE._replace(rows=n) for n in (16, 20, 32, 50, 64, 65)]
    decide(cases[:5])
    assert len(gpu.timed) == 3  # 16, 32, 64
    assert taken(cases) == [True, True, True, False, False, False]


def test_a_second_process_takes_what_was_kept(gpu: Device) -> None:
    first = decide(CASES)
    timed = len(gpu.timed)
    content = file_of(gpu).read_bytes()
    forget()
    gpu.ratio = lambda _: 9.0  # were it measured again, plain MLX would win
    variants = gpu.variants.copy()
    assert decide(CASES) == first
    assert taken() == [True] * len(CASES)
    assert len(gpu.timed) == timed
    assert file_of(gpu).read_bytes() == content
    assert gpu.variants == variants


def test_kept_choices_hold_without_a_preparation(gpu: Device) -> None:
    decide(CASES)
    forget()
    assert taken() == [True] * len(CASES)


@pytest.mark.parametrize("changed", ["chip", "mlx", "kernels", "memory", "backend"])
def test_another_chip_mlx_or_kernel_text_is_measured_anew(
    gpu: Device, changed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    decide([NORM])
    facts = {**choice.device_facts(), changed: "another"}
    forget()
    gpu.ratio = lambda _: 2.0
    monkeypatch.setattr("mlx_dora.kernels.choice.device_facts", _cached(facts))
    monkeypatch.setattr("mlx_dora.kernels.measure.device_facts", lambda: facts)
    decide([NORM])
    assert len(gpu.timed) == 2
    assert taken([NORM]) == [False]
    assert len(json.loads(file_of(gpu).read_text())["devices"]) == 2


class _cached:
    """A function with the `cache_clear` that `functools.lru_cache` gives it."""

    def __init__(self, facts: dict[str, str]) -> None:
        self.facts = facts

    def __call__(self) -> dict[str, str]:
        return self.facts

    def cache_clear(self) -> None:
        pass


@pytest.mark.parametrize("place", ["a", "z"])
def test_the_key_does_not_depend_on_where_the_sources_lie(
    place: str, gpu: Device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = choice.device_facts()["kernels"]
    package, copy = tmp_path / "m", tmp_path / place
    shutil.copytree(Path(choice.__file__).parent, package)
    shutil.copytree(choice.source_folder(), copy)
    monkeypatch.setattr(choice, "__file__", str(package / "choice.py"))
    monkeypatch.setattr(choice, "source_folder", lambda: copy)
    forget()
    assert choice.device_facts()["kernels"] == before


@pytest.mark.parametrize("file", ["dora_scale.metal", "common.h", "wide.h"])
def test_the_key_follows_the_text_of_the_kernels(
    file: str, gpu: Device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = choice.device_facts()["kernels"]
    copy = tmp_path / "metal"
    shutil.copytree(choice.source_folder(), copy)
    monkeypatch.setattr(choice, "source_folder", lambda: copy)
    forget()
    assert choice.device_facts()["kernels"] == before
    source = copy / file
    source.write_text(source.read_text() + "\n")
    forget()
    assert choice.device_facts()["kernels"] != before


def test_a_process_that_waited_takes_what_the_other_kept(gpu: Device) -> None:
    choice.choices()  # read while the file is empty
    other = trial.Choice(takes_kernel=False, kernel_us=2.0, plain_us=1.0)
    kept.keep(choice.device_text(), {NORM.text: other})
    decide([NORM])
    assert gpu.timed == []
    assert taken([NORM]) == [False]


def test_a_wrong_kernel_is_reported_once_and_never_timed(
    gpu: Device, caplog: pytest.LogCaptureFixture
) -> None:
    gpu.broken = {"adapted_norm"}
    other = NORM._replace(rows=48)
    decide([NORM, other, *CASES[2:4]])
    assert taken([NORM, other, *CASES[2:4]]) == [False, False, True, True]
    assert "adapted_norm" not in gpu.timed
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert "the metal kernel of adapted_norm in float32 is wrong by " in (
        record.getMessage()
    )
    caplog.clear()
    forget()
    decide([NORM])  # kept, and said again in a new process
    assert "is wrong by" in caplog.text


def test_a_kernel_that_does_not_compile_is_reported_in_a_line(
    gpu: Device, caplog: pytest.LogCaptureFixture
) -> None:
    gpu.refused = {"dora_scale"}
    decide([SCALE])
    assert taken([SCALE]) == [False]
    (record,) = caplog.records
    assert "does not run ([metal] no such function)" in record.getMessage()
    assert "log of the compiler" not in record.getMessage()


def test_a_wrong_gradient_counts(gpu: Device) -> None:
    gpu.broken = {"dora_scale_columns"}
    decide([SCALE, SCALE._replace(has_gradients=False)])
    assert taken([SCALE, SCALE._replace(has_gradients=False)]) == [False, True]


def test_a_forced_kernel_is_checked_at_its_own_variant_and_not_timed(
    gpu: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLX_DORA_KERNELS", "metal")
    assert decide(CASES).taken == {}
    assert taken([NORM, NORM]) == [True, True]
    assert gpu.timed == []
    assert gpu.launches["adapted_norm"] == 1
    variants = gpu.variants.copy()
    weight, a, b = mx.ones((24, 32)), mx.ones((32, 4)), mx.ones((4, 24))
    kernels.adapted_norm(weight, a, b, 0.5)
    assert gpu.launches["adapted_norm"] == 2
    assert gpu.variants == variants
    assert not file_of(gpu).exists()


def test_reference_measures_nothing(
    gpu: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLX_DORA_KERNELS", "reference")
    decisions = decide(CASES)
    assert decisions.kernels == "reference"
    assert taken() == [False] * len(CASES)
    assert gpu.launches == {}


def test_measuring_leaves_the_random_numbers_alone(gpu: Device) -> None:
    mx.random.seed(5)
    expected = mx.random.uniform(shape=(3,))
    mx.random.seed(5)
    decide(CASES)
    assert mx.array_equal(mx.random.uniform(shape=(3,)), expected)


def test_a_resumed_run_takes_the_recorded_decisions(
    gpu: Device, caplog: pytest.LogCaptureFixture
) -> None:
    before = decide(CASES)
    recorded = json.loads(json.dumps(before.__dict__))
    forget()
    file_of(gpu).unlink()
    gpu.ratio = lambda _: 2.0
    again = decide(CASES, recorded)
    assert again == before
    with again.holding():
        assert taken() == [True] * len(CASES)
    assert caplog.text == ""
    decide(CASES)  # a run that is not resumed measures for itself
    assert taken() == [False] * len(CASES)


def test_within_a_run_only_its_own_decisions_count(gpu: Device) -> None:
    """Else a resumed run would take what another run has measured meanwhile."""
    decisions = decide([NORM])
    decide(CASES)
    with decisions.holding():
        assert taken() == [case == NORM for case in CASES]
    assert taken() == [True] * len(CASES)


@pytest.mark.parametrize("changed", ["chip", "kernels"])
def test_a_resume_on_another_device_says_so_and_measures(
    gpu: Device, changed: str, caplog: pytest.LogCaptureFixture
) -> None:
    before = decide([NORM])
    recorded = {**before.__dict__, "device": {**before.device, changed: "old"}}
    forget()
    file_of(gpu).unlink()
    gpu.ratio = lambda _: 2.0
    with (
        caplog.at_level(logging.WARNING, "mlx_dora"),
        decide([NORM], recorded).holding(),
    ):
        assert taken([NORM]) == [False]
    assert f"the checkpoint was computed elsewhere: {changed} was old" in caplog.text
