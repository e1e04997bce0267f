"""A fuse refuses tensors that are not finite, by name; it accepts large values."""

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_dora.adapters.config import DoRAConfig
from mlx_dora.adapters.files import load_adapter, save_adapter
from mlx_dora.adapters.hosting import load
from mlx_dora.adapters.named import NamedAdapters
from mlx_dora.adapters.surgery import apply_dora, dora_layers
from mlx_dora.errors import DoRAError
from mlx_dora.fuse.config import FuseConfig
from mlx_dora.fuse.layer import survival
from mlx_dora.fuse.model import fuse_dora, fuse_model, save_fused
from mlx_dora.kernels.fusing import dense_fused
from mlx_dora.matrix import Adapted, LowRank
from tests.adapters.training import QV, perturb

Q0 = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def make_adapter(tmp_path: Path) -> Callable[..., Path]:
    def make(base: Path, **leaves: float) -> Path:
        """Save an adapter in which ``lora_a=1e30`` fills that tensor of one layer."""
        model, _ = load(base)
        apply_dora(model, DoRAConfig(num_layers=2, keys=QV, rank=4))
        perturb(model, 0.01)
        save_adapter(model, tmp_path / "adapter", overwrite=True)
        # Saving refuses overflow, so the file is changed afterwards.
        file = str(tmp_path / "adapter" / "adapters.safetensors")
        tensors = mx.load(file)
        assert isinstance(tensors, dict)
        for leaf, value in leaves.items():
            tensors[f"{Q0}.{leaf}"] = mx.full(tensors[f"{Q0}.{leaf}"].shape, value)
        mx.eval(tensors)
        mx.save_safetensors(file, tensors)
        return tmp_path / "adapter"

    return make


def spoil(folder: Path, name: str, value: float) -> None:
    weights = mx.load(str(folder / "model.safetensors"))
    assert isinstance(weights, dict)
    spoilt = np.array(weights[name].astype(mx.float32))
    spoilt.reshape(-1)[3] = value
    weights[name] = mx.array(spoilt).astype(weights[name].dtype)
    mx.save_safetensors(str(folder / "model.safetensors"), weights)


@pytest.mark.parametrize("mode", ["requantize", "lossless", "dequantize"])
@pytest.mark.parametrize("bits", [None, 4])
def test_a_product_beyond_float32_is_refused(
    make_tiny_folder: Callable[..., Path],
    make_adapter: Callable[..., Path],
    tmp_path: Path,
    bits: int | None,
    mode: str,
) -> None:
    base = make_tiny_folder("base", bits=bits)
    adapter = make_adapter(base, lora_a=1e30, lora_b=1e30)
    config = FuseConfig(mode=mode)  # pyright: ignore[reportArgumentType] - one of them
    with pytest.raises(DoRAError, match=f"{Q0}: the fused weight is not finite"):
        fuse_model(base, adapter, tmp_path / "f", config=config)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]
    model, _ = load(base, make_adapter(base))
    layer = dict(dora_layers(model))[Q0]
    layer.lora_a = mx.full(layer.lora_a.shape, 1e30)
    layer.lora_b = mx.full(layer.lora_b.shape, 1e30)
    with pytest.raises(DoRAError, match=f"{Q0}: .* too large for float32"):
        fuse_dora(model, dequantize=mode == "dequantize")


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(
    ("name", "bits"),
    [
        (f"{Q0}.weight", None),
        (f"{Q0}.scales", 4),
        ("model.norm.weight", None),
        ("model.layers.0.mlp.up_proj.weight", None),
        ("model.layers.0.mlp.up_proj.biases", 4),
    ],
)
def test_a_base_that_is_not_finite_is_refused(
    make_tiny_folder: Callable[..., Path],
    make_adapter: Callable[..., Path],
    tmp_path: Path,
    name: str,
    bits: int | None,
    value: float,
) -> None:
    base = make_tiny_folder("base", bits=bits)
    adapter = make_adapter(base)
    spoil(base, name, value)
    stem = name.rpartition(".")[0]
    with pytest.raises(DoRAError, match=f"{stem}.* of the base holds NaN or inf"):
        fuse_model(base, adapter, tmp_path / "f", check_base=False)
    assert not (tmp_path / "f").exists()
    model, tokenizer = load(base, adapter, check_base=False)
    with pytest.raises(DoRAError, match=f"{stem}.*NaN or inf"):
        fuse_dora(model)
        save_fused(model, tokenizer, base, tmp_path / "f")
    assert not (tmp_path / "f").exists()


def test_a_result_beyond_float16_is_refused(
    make_tiny_folder: Callable[..., Path],
    make_adapter: Callable[..., Path],
    tmp_path: Path,
) -> None:
    base = make_tiny_folder("base", dtype=mx.float16)
    with pytest.raises(DoRAError, match=f"{Q0}: .* too large for float16"):
        fuse_model(base, make_adapter(base, m=1e8), tmp_path / "f")


@pytest.mark.parametrize("size", [1e-30, 1e-22, 1e20, 1e30])
def test_survival_is_that_of_float64_at_every_size(size: float) -> None:
    rng = np.random.default_rng(0)
    weight = mx.array((rng.uniform(-1, 1, (16, 32)) * size).astype(np.float32))
    update = LowRank(
        lora_a=mx.array(rng.uniform(-1, 1, (32, 2)).astype(np.float32)),
        lora_b=mx.array((0.1 * rng.uniform(-1, 1, (2, 16)) * size).astype(np.float32)),
        scale=1.0,
    )
    m = mx.array((rng.uniform(2, 3, 16) * size).astype(np.float32))
    adapted = Adapted(update=update, m=m)
    after = dense_fused(weight, adapted, mx.float32)
    survived = survival(weight, after, adapted)
    assert survived.row_norm_error < 1e-6
    assert survived.kept == pytest.approx(1, abs=1e-5)
    assert survived.cosine == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("leaves", [{"lora_b": 3e38}, {"m": 3e38}])
def test_an_adapter_that_overflows_is_not_attached(
    make_tiny_folder: Callable[..., Path],
    make_adapter: Callable[..., Path],
    leaves: dict[str, float],
) -> None:
    base = make_tiny_folder("base")
    adapter = make_adapter(base, **leaves)
    with pytest.raises(DoRAError, match=f"too large to compute with .* in {Q0}"):
        load(base, adapter)
    model, _ = load(base)
    with pytest.raises(DoRAError, match=f"too large to compute with .* in {Q0}"):
        NamedAdapters(model).add("one", adapter)


def test_an_adapter_that_overflows_only_when_used_can_be_read(
    make_tiny_folder: Callable[..., Path], make_adapter: Callable[..., Path]
) -> None:
    base = make_tiny_folder("base")
    adapter = load_adapter(make_adapter(base, lora_a=1e30, lora_b=1e30))
    assert adapter.tensors[f"{Q0}.lora_a"].max().item() == np.float32(1e30)
