"""A training on a pretended GPU: choices made before it, recorded, and taken again."""

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_dora import DoRAConfig, apply_dora, load, save_adapter
from mlx_dora.kernels import choice
from mlx_dora.kernels.measure import decide
from mlx_dora.layers import held_norms
from mlx_dora.layers.calls import inference_cases, training_cases
from mlx_dora.train import TrainReport
from tests.kernels.device import Device, forget, pretended
from tests.train.saved import log, same_bits, tensors

Run = Callable[..., tuple[nn.Module, TrainReport]]
LLAMA_1B = {
    "hidden_size": 2048,
    "num_hidden_layers": 1,  # all sixteen are alike
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    with pretended(tmp_path / "cache", monkeypatch) as device:
        yield device


def state(folder: Path) -> dict[str, Any]:
    steps = (folder / "checkpoints").glob("[0-9]*")
    newest = max(steps, key=lambda path: int(path.name))
    return json.loads((newest / "state.json").read_text())


def test_choices_stand_in_the_log_and_in_checkpoints(
    gpu: Device, run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gpu.ratio = lambda name: 0.5 if name == "adapted_norm" else 1.5
    with caplog.at_level(logging.INFO, "mlx_dora"):
        run("adapter", iters=4, steps_per_report=2)
    first, *later = log(tmp_path / "adapter")
    recorded = first["kernels"]
    assert recorded["kernels"] == "auto"
    assert recorded["device"]["backend"] == "metal"
    assert recorded["taken"]
    for text, is_taken in recorded["taken"].items():
        assert is_taken == text.startswith("adapted_norm")
    assert later
    assert not any("kernels" in line for line in later)
    assert state(tmp_path / "adapter")["kernels"] == recorded
    assert "Kernels are faster for" in caplog.text
    assert "Kernels run" in caplog.text


def test_a_run_uses_the_kernels_that_it_chose(gpu: Device, run: Run) -> None:
    run("adapter", iters=2)
    measured = dict(gpu.launches)
    run("again", iters=2)  # everything is kept, so each launch is a call of a step
    steps = {name: n - measured[name] for name, n in gpu.launches.items()}
    assert steps["dora_scale_backward"] == 2 * 14  # two steps of 2 x 7 layers
    assert steps["dora_scale"] >= 2 * 14
    assert steps["adapted_norm"] >= 2 * 14  # reports measure the geometry too
    gpu.ratio = lambda _: 1.0
    forget()
    (tmp := gpu.launches).clear()
    run("third", iters=1)
    assert tmp  # kept from the first run, although a measurement would say otherwise


def test_where_plain_mlx_is_faster_no_kernel_runs(gpu: Device, run: Run) -> None:
    gpu.ratio = lambda _: 1.0
    run("adapter", iters=1)
    gpu.launches.clear()
    run("again", iters=1)
    assert gpu.launches == {}


def test_a_resumed_run_takes_the_recorded_choice_and_the_same_bits(
    gpu: Device, run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # Kernels whose results differ from plain MLX's, as on a device, in the last bits.
    whole = {"iters": 6, "save_every": 2, "steps_per_report": 2}
    run("whole", **whole)
    run("part", **{**whole, "iters": 2})
    forget()
    (tmp_path / "cache" / "kernels.json").unlink()
    gpu.ratio = lambda _: 5.0  # measured anew, plain MLX would be taken
    timed = len(gpu.timed)
    run("part", resume=True, **whole)
    assert len(gpu.timed) == timed
    assert same_bits(tensors(tmp_path / "whole"), tensors(tmp_path / "part"))
    kernels = [state(tmp_path / name)["kernels"] for name in ("whole", "part")]
    assert kernels[0] == kernels[1]
    assert "kernels" in log(tmp_path / "part")[0]
    assert sum("kernels" in line for line in log(tmp_path / "part")) == 1
    assert "elsewhere" not in caplog.text


def test_a_resume_on_another_device_says_so_and_logs_its_own_choice(
    gpu: Device, run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run("adapter", iters=2, save_every=2)
    path = tmp_path / "adapter" / "checkpoints" / "2" / "state.json"
    content = json.loads(path.read_text())
    content["kernels"]["device"]["chip"] = "Apple M9"
    path.write_text(json.dumps(content))
    run("adapter", iters=4, save_every=2, resume=True)
    assert "computed elsewhere: chip was Apple M9, is " in caplog.text
    lines = [line for line in log(tmp_path / "adapter") if "kernels" in line]
    chips = [line["kernels"]["device"]["chip"] for line in lines]
    assert len(chips) == 2
    assert chips[0] == chips[1]  # the first was logged before the file was changed
    assert state(tmp_path / "adapter")["kernels"]["device"]["chip"] == chips[1]


def test_a_checkpoint_without_choices_is_resumed_in_silence(
    run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run("adapter", iters=2, save_every=2)
    path = tmp_path / "adapter" / "checkpoints" / "2" / "state.json"
    content = json.loads(path.read_text())
    assert content["kernels"]["kernels"] == "reference"
    del content["kernels"]
    path.write_text(json.dumps(content))
    run("adapter", iters=4, save_every=2, resume=True)
    assert "elsewhere" not in caplog.text


def test_decisions_end_with_the_run(gpu: Device, run: Run) -> None:
    run("adapter", iters=1)
    assert choice._TABLE.pinned is None


def test_a_first_step_of_a_dense_1b_model_compiles_five_variants(
    gpu: Device, make_tiny_model: Callable[..., nn.Module]
) -> None:
    """Counted with all that measuring compiles; nine were compiled before."""
    model = make_tiny_model(**LLAMA_1B)  # float32 is faster on a CPU
    apply_dora(model, DoRAConfig(rank=8, scale=2.0, num_layers=-1))
    cases = training_cases(model, [2 * 16])
    decisions = decide(cases)
    assert len(decisions.taken) == 4 + 2 * 3  # norms by shape, scales by width
    step = nn.value_and_grad(model, _loss)
    measured = gpu.variants.copy()
    with decisions.holding(), held_norms(model.train()):
        loss, gradients = step(model, mx.zeros((2, 16), dtype=mx.int32))
        mx.eval(loss, gradients)
    assert gpu.variants == measured
    assert {name for name, _, _ in gpu.variants} >= {
        "adapted_norm",
        "dora_scale",
        "dora_scale_backward",
        "dora_scale_columns",
    }
    assert len(gpu.variants) <= 5


def _loss(model: nn.Module, tokens: mx.array) -> mx.array:
    return model(tokens).astype(mx.float32).mean()


def test_recording_changes_neither_mode_nor_random_numbers(
    gpu: Device, tiny_model: nn.Module
) -> None:
    apply_dora(tiny_model, DoRAConfig(rank=2, dropout=0.5, num_layers=-1))
    tiny_model.eval()
    mx.random.seed(3)
    expected = mx.random.uniform(shape=(2,))
    mx.random.seed(3)
    assert training_cases(tiny_model, [8])
    assert not tiny_model.training
    assert mx.array_equal(mx.random.uniform(shape=(2,)), expected)
    assert gpu.launches == {}


def test_loading_an_adapter_measures_decoding_and_prompts(
    gpu: Device, tiny_model_folder: Path, tmp_path: Path
) -> None:
    model, _ = load(tiny_model_folder)
    apply_dora(model, DoRAConfig(rank=2, num_layers=-1))
    save_adapter(model, tmp_path / "adapter")
    assert gpu.timed == []
    loaded, _ = load(tiny_model_folder, tmp_path / "adapter")
    assert {*gpu.timed} == {"dora_scale"}
    timed, compiled = len(gpu.timed), len(gpu.variants)
    gpu.launches.clear()
    mx.eval(loaded(mx.array([[5]])))
    assert gpu.launches == {"dora_scale": 14}
    load(tiny_model_folder, tmp_path / "adapter")
    assert len(gpu.timed) == timed
    assert len(gpu.variants) == compiled  # decoding runs what was measured
    assert {case.rows for case in inference_cases(loaded, (1, 7))} == {1, 7}


def test_a_cpu_lists_no_cases(tiny_model: nn.Module) -> None:
    apply_dora(tiny_model, DoRAConfig(rank=2, num_layers=-1))
    assert training_cases(tiny_model, [8]) == []
