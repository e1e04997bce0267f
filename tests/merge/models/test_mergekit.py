"""mergekit itself on the same YAML and the same checkpoints: values agree.

Runs where torch and mergekit are installed, here or in the interpreter that
``MLX_DORA_PEERS_PYTHON`` names.
"""

import json
import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import yaml

from mlx_dora.io.checkpoint import Checkpoint, ShardWriter
from mlx_dora.merge import merge_models
from mlx_dora.merge.methods.settings import TensorSettings
from mlx_dora.merge.models.merge import run_merge
from mlx_dora.merge.models.mergekit import read_mergekit
from mlx_dora.merge.models.plan import MergePlan
from mlx_dora.merge.models.settings import count_blocks
from tests.checks import relative_rms, to_numpy
from tests.compat.peer_process import peers_python
from tests.merge.models.places import settings_of
from tests.merge.oracle import total

SCRIPT = Path(__file__).parents[2] / "compat" / "mergekit_peer.py"
GRADIENT = [{"filter": "self_attn", "value": [0, 0.5, 1]}, {"value": 0.3}]
CONFIGS: dict[str, Callable[[list[str]], dict[str, Any]]] = {
    "linear": lambda m: {
        "merge_method": "linear",
        "models": [
            {"model": m[0], "parameters": {"weight": 0.7}},
            {"model": m[1], "parameters": {"weight": GRADIENT}},
            {"model": m[2], "parameters": {"weight": 0.4}},
        ],
    },
    "slerp": lambda m: {
        "merge_method": "slerp",
        "base_model": m[0],
        "models": [{"model": m[0]}, {"model": m[1]}],
        "parameters": {"t": GRADIENT},
    },
    "karcher": lambda m: {
        "merge_method": "karcher",
        "models": [{"model": name} for name in m],
    },
    "task_arithmetic": lambda m: {
        "merge_method": "task_arithmetic",
        "base_model": m[0],
        "models": [
            {"model": m[1], "parameters": {"weight": 0.6}},
            {"model": m[2], "parameters": {"weight": [0.2, 0.9]}},
        ],
        "parameters": {"lambda": 0.8},
    },
    "ties": lambda m: {
        "merge_method": "ties",
        "base_model": m[0],
        "models": [
            {"model": m[1], "parameters": {"weight": 1.0, "density": 0.3}},
            {"model": m[2], "parameters": {"weight": 0.5, "density": 0.6}},
        ],
    },
}


def run_mergekit(config: dict[str, Any], out: Path) -> dict[str, float]:
    python = peers_python("torch", "mergekit")
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config))
    hidden = ("PYTHONPATH", "LD_PRELOAD")
    environment = {k: v for k, v in os.environ.items() if k not in hidden}
    done = subprocess.run(
        [python, str(SCRIPT), str(path), str(out)],
        capture_output=True, text=True, timeout=900,
        env={**environment, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


Arrays = Sequence[np.ndarray]


def exact_linear(tensors: Arrays, settings: TensorSettings) -> np.ndarray:
    weights = settings.weights
    return total(w * x for w, x in zip(weights, tensors, strict=True)) / sum(weights)


def exact_slerp(tensors: Arrays, settings: TensorSettings) -> np.ndarray:
    a, b = tensors
    cosine = (a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum())
    if abs(cosine) > 0.9995:
        return exact_linear(tensors, settings)
    theta = np.arccos(cosine)
    first, second = np.sin(settings.weights * theta) / np.sin(theta)
    return first * a + second * b


def exact_karcher(tensors: Arrays, settings: TensorSettings) -> np.ndarray:
    norms = [np.linalg.norm(tensor) for tensor in tensors]
    units = [tensor / size for tensor, size in zip(tensors, norms, strict=True)]
    mean = total(units)
    mean /= np.linalg.norm(mean)
    for _ in range(20):
        tangent = np.zeros_like(mean)
        for unit in units:
            cosine = (mean * unit).sum()
            theta = np.arccos(min(cosine, 1.0))
            factor = theta / np.sin(theta) if theta > 0 else 1.0
            tangent += factor * (unit - cosine * mean) / len(units)
        size = np.linalg.norm(tangent)
        mean = np.cos(size) * mean + np.sin(size) * tangent / (size or 1.0)
        mean /= np.linalg.norm(mean)
        if size < 1e-8:
            break
    return mean * np.mean(norms)


def exact_task_arithmetic(tensors: Arrays, settings: TensorSettings) -> np.ndarray:
    base, *others = tensors
    moved = [w * (x - base) for w, x in zip(settings.weights, others, strict=True)]
    return base + settings.scale * total(moved)


def exact_ties(tensors: Arrays, settings: TensorSettings) -> np.ndarray:
    """Task vectors are rounded to float32 before they are trimmed, as mergekit does."""
    base, *others = tensors
    assert settings.density is not None
    moved = []
    for weight, share, array in zip(
        settings.weights, settings.density, others, strict=True
    ):
        delta = (array - base).astype(np.float32).astype(np.float64).ravel()
        kept = np.argsort(-np.abs(delta), kind="stable")[: int(share * delta.size)]
        trimmed = np.zeros_like(delta)
        trimmed[kept] = weight * delta[kept]
        moved.append(trimmed.reshape(base.shape))
    sign = np.where(total(moved) >= 0, 1, -1)
    agrees = [np.sign(change) == sign for change in moved]
    merged = total(change * agree for change, agree in zip(moved, agrees, strict=True))
    share = total(w * a for w, a in zip(settings.weights, agrees, strict=True))
    return base + merged / np.where(share == 0, 1, share)


EXACT = {
    "linear": exact_linear,
    "slerp": exact_slerp,
    "karcher": exact_karcher,
    "task_arithmetic": exact_task_arithmetic,
    "ties": exact_ties,
}


def assert_same(ours: Path, theirs: Path, plan: MergePlan) -> None:
    """Ours is within 1e-6 of float64, and within 1e-5 of mergekit's where it is too.

    mergekit sums whole tensors in float32: its karcher of the embeddings is 2e-2 off.
    """
    result, expected = Checkpoint(ours), Checkpoint(theirs)
    needs_base = plan.base is not None and plan.method in ("task_arithmetic", "ties")
    names = [plan.base, *plan.models] if needs_base else plan.models
    inputs = [Checkpoint(str(name)) for name in names]
    blocks = count_blocks(result.names)
    assert result.names == expected.names
    off = []
    for name in expected.names:
        merged = to_numpy(result.tensor(name))
        tensors = [to_numpy(folder.tensor(name)) for folder in inputs]
        settings = settings_of(plan, name, 1, blocks)
        exact = EXACT[plan.method](tensors, settings)
        error = relative_rms(merged, exact)
        assert error <= 1e-6, f"{name}: {error:.2e} off float64"
        peer = to_numpy(expected.tensor(name))
        theirs_off = relative_rms(peer, exact)
        if plan.method == "ties":
            assert_only_equals_differ(merged, peer, tensors, settings)
        if theirs_off > 9e-6:
            off.append(f"{name}: mergekit is {theirs_off:.2e} off, we {error:.2e}")
        else:
            error = relative_rms(merged, peer)
            assert error <= 1e-5, f"{name}: {error:.2e} off mergekit"
    print("\n".join(off))  # noqa: T201 - shown with -s
    assert not off or plan.method in ("karcher", "ties")


def assert_only_equals_differ(
    ours: np.ndarray, theirs: np.ndarray, tensors: Arrays, settings: TensorSettings
) -> None:
    """Among entries equal to the smallest kept entry, mergekit keeps any."""
    differs = np.abs(ours - theirs) > 1e-6 * np.abs(theirs).max()
    assert settings.density is not None
    is_equal = np.zeros(ours.shape, bool)
    for share, array in zip(settings.density, tensors[1:], strict=True):
        size = np.abs((array - tensors[0]).astype(np.float32))
        place = size.size - int(share * size.size)
        is_equal |= size == np.partition(size.ravel(), place)[place]
    assert not (differs & ~is_equal).any()


def perturbed(source: Path, folder: Path, seed: int) -> Path:
    """A simulated fine-tuned checkpoint: every tensor moved by a few percent."""
    folder.mkdir()
    for path in source.iterdir():
        if path.suffix == ".json" and "index" not in path.name:
            (folder / path.name).write_bytes(path.read_bytes())
    checkpoint, rng = Checkpoint(source), np.random.default_rng(seed)
    with ShardWriter(folder) as writer:
        for name in checkpoint.names:
            value = np.array(checkpoint.tensor(name))
            size = 0.1 * value.std() + 1e-3
            noise = rng.standard_normal(value.shape, dtype=np.float32)
            writer.add(name, mx.array(value + size * noise))
    return folder


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory, smollm: Path) -> list[str]:
    """SmolLM2 and two slightly perturbed copies."""
    peers_python("torch", "mergekit")
    at = tmp_path_factory.mktemp("models")
    tuned = [perturbed(smollm, at / f"tuned{seed}", seed) for seed in (1, 2)]
    return [str(smollm), *map(str, tuned)]


@pytest.mark.slow
@pytest.mark.real_model
@pytest.mark.parametrize("method", CONFIGS)
def test_agrees_with_mergekit_on_a_real_model(
    trio: list[str], tmp_path: Path, method: str
) -> None:
    config = CONFIGS[method](trio)
    run_mergekit(config, tmp_path / "theirs")
    plan = read_mergekit(config)
    run_merge(plan, tmp_path / "ours")
    assert_same(tmp_path / "ours", tmp_path / "theirs", plan)


@pytest.mark.slow
def test_rowwise_slerp_is_mergekits_where_rows_have_one_length(
    make_tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """Its nuslerp interpolates whole rows; our slerp separates length and direction."""
    models = [make_tiny_folder(f"m{seed}", seed=seed) for seed in (1, 2)]
    for folder in models:
        path = str(folder / "model.safetensors")
        tensors = mx.load(path)
        assert isinstance(tensors, dict)
        unit = {
            name: value / mx.linalg.norm(value, axis=-1, keepdims=True)
            for name, value in tensors.items()
        }
        mx.eval(unit)
        mx.save_safetensors(path, unit, {"format": "pt"})
    entries = [
        {"model": str(name), "parameters": {"weight": w}}
        for name, w in zip(models, (0.3, 0.7), strict=True)
    ]
    config = {
        "merge_method": "nuslerp",
        "models": entries,
        "parameters": {"nuslerp_flatten": False, "nuslerp_row_wise": False},
    }
    run_mergekit(config, tmp_path / "theirs")
    merge_models(models, save_path=tmp_path / "ours", weights=[0.3, 0.7])
    ours, theirs = Checkpoint(tmp_path / "ours"), Checkpoint(tmp_path / "theirs")
    for name in theirs.names:
        if len(theirs.info(name).shape) > 1:
            error = relative_rms(ours.tensor(name), to_numpy(theirs.tensor(name)))
            assert error <= 1e-5, f"{name}: {error:.2e}"
