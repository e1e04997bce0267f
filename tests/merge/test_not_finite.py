"""Merging and extracting refuse NaN and inf by name, and work at every other size."""

import warnings
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_dora.adapters.config import DoRAConfig
from mlx_dora.adapters.files import save_adapter
from mlx_dora.adapters.hosting import load
from mlx_dora.adapters.surgery import apply_dora, dora_layers
from mlx_dora.analyze.adapter import analyze_adapter
from mlx_dora.errors import DoRAError
from mlx_dora.merge.adapters import merge_adapters
from mlx_dora.merge.adapters.extract import extract_adapter
from mlx_dora.merge.methods import METHODS
from mlx_dora.merge.models import merge_models
from tests.adapters.training import perturb
from tests.merge.names import most, needed

Q1 = "model.layers.1.self_attn.q_proj"


@pytest.fixture
def make_adapter(tmp_path: Path) -> Callable[..., Path]:
    def make(base: Path, name: str = "adapter", **leaves: float) -> Path:
        model, _ = load(base)
        keys = ("self_attn.q_proj",)
        apply_dora(model, DoRAConfig(num_layers=1, keys=keys, rank=4))
        perturb(model, 0.01)
        save_adapter(model, tmp_path / name)
        file = tmp_path / name / "adapters.safetensors"
        tensors = mx.load(str(file))
        assert isinstance(tensors, dict)
        for leaf, value in leaves.items():
            tensors[f"{Q1}.{leaf}"] = mx.full(tensors[f"{Q1}.{leaf}"].shape, value)
        mx.save_safetensors(str(file), tensors)
        return tmp_path / name

    return make


@pytest.mark.parametrize(
    "method", [name for name, entry in METHODS.items() if not entry.needs_fisher]
)
@pytest.mark.parametrize("rank", [None, 2])
def test_adapters_beyond_float32_are_refused_in_one_line(
    tiny_model_folder: Path,
    make_adapter: Callable[..., Path],
    tmp_path: Path,
    method: str,
    rank: int | None,
) -> None:
    small = make_adapter(tiny_model_folder, "small")
    large = make_adapter(tiny_model_folder, "large", lora_a=3e38, lora_b=3e38)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(DoRAError, match=Q1):
            merge_adapters(
                [large] if most(method, 2) == 1 else [small, large],
                model=tiny_model_folder,
                method=method,
                rank=rank,
                parameters=needed(method),
                save_path=tmp_path / "m",
            )
    assert not (tmp_path / "m").exists()


def scale_model(folder: Path, factor: float) -> None:
    weights = mx.load(str(folder / "model.safetensors"))
    assert isinstance(weights, dict)
    scaled = {name: value * factor for name, value in weights.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), scaled)


@pytest.mark.parametrize("size", [1e-25, 1e20, 1e30])
def test_extraction_and_analysis_work_at_every_size(
    make_tiny_folder: Callable[..., Path], tmp_path: Path, size: float
) -> None:
    base, tuned = make_tiny_folder("base"), make_tiny_folder("tuned", seed=1)
    keys = ("self_attn.q_proj",)
    result = {}
    for factor in (1.0, size):
        scale_model(base, factor)
        scale_model(tuned, factor)
        out = tmp_path / f"x{factor}"
        made = extract_adapter(base, tuned, rank=8, keys=keys, save_path=out)
        geometry = [layer.delta_d for layer in analyze_adapter(out, base).layers]
        result[factor] = (
            [(layer.error, layer.discarded) for layer in made.layers],
            geometry,
        )
    np.testing.assert_allclose(result[size][0], result[1.0][0], rtol=1e-3)
    np.testing.assert_allclose(result[size][1], result[1.0][1], rtol=1e-3)


def test_packed_scales_beyond_their_dtype_are_refused(
    make_tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folders = [make_tiny_folder(n, seed=i, bits=4) for i, n in enumerate("ab")]
    for folder in folders:
        weights = mx.load(str(folder / "model.safetensors"))
        assert isinstance(weights, dict)
        for name in (f"{Q1}.scales", f"{Q1}.biases"):
            weights[name] = (weights[name] * 0 + 4000).astype(mx.float16)
        mx.save_safetensors(str(folder / "model.safetensors"), weights)
    with pytest.raises(DoRAError, match=rf"{Q1}\.weight: the merged tensor is too lar"):
        merge_models(
            folders,
            save_path=tmp_path / "m",
            method="linear",
            weights=[3.0, 3.0],
            parameters={"normalize": False},
        )


def test_saving_an_adapter_whose_norms_overflow_is_refused(
    tiny_model_folder: Path, make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    model, _ = load(tiny_model_folder, make_adapter(tiny_model_folder))
    layer = dict(dora_layers(model))[Q1]
    layer.lora_a = mx.full(layer.lora_a.shape, 1e30)
    layer.lora_b = mx.full(layer.lora_b.shape, 1e30)
    with pytest.raises(DoRAError, match=f"{Q1}: the norms of the adapted rows are not"):
        save_adapter(model, tmp_path / "again")
    assert not (tmp_path / "again").exists()
