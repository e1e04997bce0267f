"""What checkpoints of mergekit's users hold: experts, dtypes, packings, copies."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_dora import DoRAError
from mlx_dora.io.checkpoint import Checkpoint
from mlx_dora.merge import merge_models
from mlx_dora.merge.methods import METHODS
from mlx_dora.merge.models import read_mergekit, run_merge
from mlx_dora.merge.models.dry_run import dry_run
from mlx_dora.merge.models.plan import plan_models
from tests.checks import assert_close, to_numpy
from tests.merge.names import ALL, SPECTRAL, most, needed

STACK = "model.layers.0.block_sparse_moe.switch_mlp.up_proj.weight"
EXPERTS, ROWS, WIDTH = 3, 8, 64


def make(folder: Path, tensors: Mapping[str, mx.array], **config: Any) -> Path:
    folder.mkdir()
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tensors))
    content = {"model_type": "mixtral", **config}
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def stacks(tmp_path: Path, count: int) -> list[Path]:
    rng = np.random.default_rng(0)
    base = rng.standard_normal((EXPERTS, ROWS, WIDTH)).astype(np.float32)
    made = []
    for i in range(count):
        noise = rng.standard_normal(base.shape).astype(np.float32)
        value = base + 0.1 * i * noise
        made.append(make(tmp_path / f"m{i}", {STACK: mx.array(value)}))
    return made


@pytest.mark.parametrize(
    "method", [m for m in ALL if not METHODS[m].needs_fisher and m not in SPECTRAL]
)
def test_a_stack_of_experts_is_merged_as_its_rows(tmp_path: Path, method: str) -> None:
    """Row by row, or by element: as a matrix of all experts' rows."""
    base, *tuned = stacks(tmp_path, 1 + most(method, 2))
    flat = []
    for folder in (base, *tuned):
        value = Checkpoint(folder).tensor(STACK).reshape(-1, WIDTH)
        flat.append(make(tmp_path / f"flat_{folder.name}", {STACK: value}))
    parameters = needed(method, gamma=0.1, select_topk=0.5)
    if METHODS[method].density is not None:
        parameters["density"] = 0.5
    results = []
    for folders, out in (((base, *tuned), "out"), (flat, "flat")):
        start, *others = folders
        merge_models(
            others, base=start, method=method, save_path=tmp_path / out,
            parameters=parameters,
        )  # fmt: skip
        results.append(to_numpy(Checkpoint(tmp_path / out).tensor(STACK)))
    assert results[0].shape == (EXPERTS, ROWS, WIDTH)
    assert (results[0].reshape(-1, WIDTH) == results[1]).all()
    assert np.abs(results[0] - to_numpy(Checkpoint(base).tensor(STACK))).max() > 1e-3


def test_packed_experts_are_packed_again(tmp_path: Path) -> None:
    dense = stacks(tmp_path, 2)
    packing = {"group_size": 32, "bits": 8, "mode": "affine"}
    folders = []
    for folder in dense:
        value = Checkpoint(folder).tensor(STACK)
        w, scales, biases = mx.quantize(value, 32, 8)
        path = STACK.removesuffix("weight")
        tensors = {STACK: w, f"{path}scales": scales, f"{path}biases": biases}
        target = tmp_path / f"packed_{folder.name}"
        folders.append(make(target, tensors, quantization=packing))
    report = merge_models(folders, method="linear", save_path=tmp_path / "out")
    (tensor,) = report.tensors
    assert tensor.packing_error is not None
    assert tensor.packing_error < 0.01
    out = Checkpoint(tmp_path / "out")
    parts = [out.tensor(f"{STACK.removesuffix('weight')}{leaf}")
             for leaf in ("weight", "scales", "biases")]  # fmt: skip
    result = mx.dequantize(*parts, group_size=32, bits=8)
    both = [to_numpy(Checkpoint(folder).tensor(STACK)) for folder in dense]
    assert_close(result, np.mean(both, axis=0), bound=0.01)


@pytest.mark.parametrize("asked", [None, "float32"])
def test_models_of_other_dtypes_merge_with_a_note(
    make_tiny_folder: Callable[..., Path], tmp_path: Path, asked: str | None
) -> None:
    """The arithmetic is float32; the output has the first model's dtype, or the one
    asked for."""
    a = make_tiny_folder("a", seed=1, dtype=mx.bfloat16)
    b = make_tiny_folder("b", seed=2)
    report = merge_models(
        [a, b], method="linear", save_path=tmp_path / "out", dtype=asked
    )
    note = next(line for line in report.lines() if "dtypes differ" in line)
    assert f"{a} bfloat16; {b} float32" in note
    name = "model.layers.0.mlp.up_proj.weight"
    result = Checkpoint(tmp_path / "out").tensor(name)
    assert result.dtype == (mx.bfloat16 if asked is None else mx.float32)
    mean = to_numpy(Checkpoint(a).tensor(name)) + to_numpy(Checkpoint(b).tensor(name))
    bound = 8e-3 if asked is None else 1e-6
    assert_close(result, mean / 2, bound=bound)


def float8(folder: Path, name: str) -> None:
    """Give a tensor of a file the dtype F8_E4M3."""
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + size])
    body = whole[8 + size :]
    header[name]["dtype"] = "F8_E4M3"
    header[name]["shape"][-1] *= 4  # float32 has four bytes
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


@pytest.mark.parametrize("is_dry", [False, True])
def test_float8_is_refused_by_name(
    make_tiny_folder: Callable[..., Path], tmp_path: Path, is_dry: bool
) -> None:
    a, b = (make_tiny_folder(f"m{seed}", seed=seed) for seed in (1, 2))
    name = "model.layers.0.mlp.up_proj.weight"
    float8(b, name)
    with pytest.raises(DoRAError, match=rf"{b}.*{name}.*float8") as caught:
        if is_dry:
            dry_run(plan_models([a, b]))
        else:
            merge_models([a, b], save_path=tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("is_dry", [False, True])
def test_weights_packed_by_other_tools_are_refused_by_name(
    make_tiny_folder: Callable[..., Path], tmp_path: Path, is_dry: bool
) -> None:
    """GPTQ and AWQ store 32-bit words under names of their own."""
    folders = []
    for seed in (1, 2):
        folder = make_tiny_folder(f"m{seed}", seed=seed)
        path = str(folder / "model.safetensors")
        tensors = mx.load(path)
        assert isinstance(tensors, dict)
        mx.eval(tensors)
        start = "model.layers.0.mlp.up_proj."
        del tensors[f"{start}weight"]
        tensors[f"{start}qweight"] = mx.full((4, 64), seed, mx.int32)
        tensors[f"{start}qzeros"] = mx.full((4, 8), seed, mx.int32)
        mx.save_safetensors(path, tensors, {"format": "pt"})
        folders.append(folder)
    with pytest.raises(DoRAError, match=r"up_proj\.qweight.*packed by another tool"):
        if is_dry:
            dry_run(plan_models(folders))
        else:
            merge_models(folders, save_path=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tied_head_of_one_model_and_an_own_head_of_another(
    make_tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """The tied model's embedding is its head; the report says so."""
    own = make_tiny_folder("own", seed=1, tie_word_embeddings=False)
    tied = make_tiny_folder("tied", seed=2, tie_word_embeddings=True)
    entries = [
        {"model": str(folder), "parameters": {"weight": weight}}
        for folder, weight in ((own, 1.0), (tied, 3.0))
    ]
    config = {"merge_method": "linear", "models": entries}
    report = run_merge(read_mergekit(config), tmp_path / "out")
    head = to_numpy(Checkpoint(own).tensor("lm_head.weight"))
    table = to_numpy(Checkpoint(tied).tensor("model.embed_tokens.weight"))
    result = Checkpoint(tmp_path / "out").tensor("lm_head.weight")
    assert_close(result, (head + 3 * table) / 4, bound=1e-6)
    assert any("is merged as lm_head.weight" in line for line in report.lines())
    with pytest.raises(DoRAError, match=r"extra: lm_head.*its own head"):
        merge_models([tied, own], save_path=tmp_path / "none")
