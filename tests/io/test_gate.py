"""Dtypes that are accepted, by role of the tensor, and messages about the others."""

import json
import logging
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_dora.adapters.attach import attach_adapter
from mlx_dora.adapters.config import DoRAConfig
from mlx_dora.adapters.files import load_adapter, save_adapter
from mlx_dora.adapters.hosting import load, use_in_mlx_lm
from mlx_dora.adapters.surgery import apply_dora
from mlx_dora.errors import DoRAError
from mlx_dora.io.checkpoint import Checkpoint
from mlx_dora.io.gate import check_dtypes, read_tensors
from mlx_dora.io.header import read_header
from mlx_dora.merge.models import merge_models
from mlx_dora.peft import from_peft
from tests.checks import to_numpy

# Bits per element of the dtypes whose names do not end with them.
BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8}
BITS |= {f"F8_{kind}": 8 for kind in ("E5M2", "E4M3", "E8M0", "E4M3FNUZ", "E5M2FNUZ")}
REFUSED = ["C64", *(name for name in BITS if name != "BOOL")]
INTEGERS = ["BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"]


def write_raw(
    path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...], bytes]]
) -> Path:
    header, data = {}, b""
    for name, (dtype, shape, values) in tensors.items():
        ends = [len(data), len(data) + len(values)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": ends}
        data += values
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def zeros(dtype: str) -> tuple[str, tuple[int, ...], bytes]:
    return dtype, (2, 4), bytes(bits(dtype))


def bits(dtype: str) -> int:
    return BITS.get(dtype) or int(dtype.lstrip("BFCIU"))


def as_raw(name: str, value: mx.array) -> tuple[str, tuple[int, ...], bytes]:
    values = np.array(value.astype(mx.float32))
    return name, values.shape, values.astype({"F64": "<f8"}.get(name, "<f4")).tobytes()


@pytest.mark.parametrize("dtype", REFUSED)
@pytest.mark.parametrize("name", ["model.a.weight", "model.rope.inv_freq"])
def test_an_unsupported_dtype_is_refused_by_name(
    tmp_path: Path, dtype: str, name: str
) -> None:
    path = write_raw(tmp_path / "model.safetensors", {name: zeros(dtype)})
    with pytest.raises(DoRAError, match=f"{name}.*{dtype}") as refusal:
        read_tensors(path)
    assert ("float8" in str(refusal.value)) == dtype.startswith("F8")
    with pytest.raises(DoRAError, match=name):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("leaf", ["weight", "scales", "lora_a", "m"])
def test_integers_in_the_place_of_a_weight_are_refused(
    tmp_path: Path, dtype: str, leaf: str
) -> None:
    path = write_raw(tmp_path / "a.safetensors", {f"x.{leaf}": zeros(dtype)})
    with pytest.raises(DoRAError, match=rf"x\.{leaf}: integers \({dtype}\)"):
        read_tensors(path)


@pytest.mark.parametrize("dtype", INTEGERS)
def test_integers_that_are_not_weights_are_accepted_unchanged(
    tmp_path: Path, dtype: str
) -> None:
    values = bytes(8 * [1, 0, 0, 0, 0, 0, 0, 0])[: bits(dtype)]
    names = "model.position_ids", "model.bn.num_batches_tracked", "h.0.attn.bias"
    entry: tuple[str, tuple[int, ...], bytes] = dtype, (8,), values
    tensors = dict.fromkeys(map(str, names), entry)
    loaded = read_tensors(write_raw(tmp_path / "a.safetensors", tensors))
    plain = mx.load(str(tmp_path / "a.safetensors"))
    assert isinstance(plain, dict)
    assert all(mx.array_equal(loaded[name], plain[name]) for name in names)
    with pytest.raises(DoRAError, match=r"attn\.bias: integers"):
        read_tensors(tmp_path / "a.safetensors", all_weights=True)


@pytest.mark.parametrize(
    ("mode", "bits", "group_size"),
    [("affine", 4, 32), ("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)],
)
def test_packed_weights_of_mlx_are_accepted(
    tmp_path: Path, mode: str, bits: int, group_size: int
) -> None:
    packed = mx.quantize(mx.random.normal((8, 64)), group_size, bits, mode)
    parts = dict(zip(("weight", "scales", "biases"), packed, strict=False))
    tensors = {f"x.{leaf}": value for leaf, value in parts.items()}
    mx.save_safetensors(str(tmp_path / "a.safetensors"), tensors)
    loaded = read_tensors(tmp_path / "a.safetensors")
    assert all(mx.array_equal(loaded[name], tensors[name]) for name in tensors)


def test_float64_is_rounded_once_and_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    exact = np.random.default_rng(0).standard_normal((2, 4))
    half = mx.arange(8, dtype=mx.bfloat16)
    raw = np.array(half.view(mx.uint16)).tobytes()
    write_raw(
        tmp_path / "model.safetensors",
        {
            "x.weight": ("F64", (2, 4), exact.tobytes()),
            "y.weight": ("BF16", (8,), raw),
            "ids": ("I64", (2,), np.array([3, -4]).tobytes()),
        },
    )
    caplog.set_level(logging.WARNING)
    files = Checkpoint(tmp_path)
    one_by_one = {name: files.tensor(name) for name in files.names}
    for tensors in (read_tensors(tmp_path / "model.safetensors"), one_by_one):
        assert tensors["x.weight"].dtype == mx.float32
        assert np.array_equal(np.array(tensors["x.weight"]), exact.astype(np.float32))
        assert mx.array_equal(tensors["y.weight"], half)
        assert tensors["ids"].tolist() == [3, -4]
    assert "float64 is rounded to float32 in x.weight" in caplog.text
    stored = Checkpoint(tmp_path).stored("x.weight")
    assert np.array_equal(np.array(stored[1:]), exact[1:].astype(np.float32))


def test_float64_beyond_float32_is_refused(tmp_path: Path) -> None:
    value = np.array([1e300, 1.0]).tobytes()
    path = write_raw(tmp_path / "a.safetensors", {"x.weight": ("F64", (2,), value)})
    with pytest.raises(DoRAError, match=r"x\.weight holds float64 values too large"):
        read_tensors(path)


def test_half_a_surrogate_in_a_name_is_refused(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "a.safetensors", {"x\ud800": zeros("F32")})
    with pytest.raises(DoRAError, match="invalid JSON in header"):
        read_tensors(path)


@pytest.fixture
def adapter_folder(tiny_model_folder: Path, tmp_path: Path) -> Path:
    model, _ = load(tiny_model_folder)
    apply_dora(model, DoRAConfig(rank=4, num_layers=1, keys=("self_attn.q_proj",)))
    save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter"


def test_an_adapter_in_float64_is_rounded_when_loaded(adapter_folder: Path) -> None:
    wanted = load_adapter(adapter_folder).tensors
    raw = {name: as_raw("F64", value) for name, value in wanted.items()}
    write_raw(adapter_folder / "adapters.safetensors", raw)
    tensors = load_adapter(adapter_folder).tensors
    assert all(mx.array_equal(tensors[name], wanted[name]) for name in wanted)


def test_a_peft_adapter_of_integers_is_refused(tmp_path: Path) -> None:
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    name = "base_model.model.q.lora_A.weight"
    write_raw(tmp_path / "adapter_model.safetensors", {name: zeros("F8_E4M3")})
    with pytest.raises(DoRAError, match=r"lora_A\.weight: float8"):
        from_peft(tmp_path)


def test_a_float64_model_is_rounded_when_loaded_and_merged(
    make_tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    base, wide = make_tiny_folder("base"), make_tiny_folder("wide")
    weights = mx.load(str(base / "model.safetensors"))
    assert isinstance(weights, dict)
    raw = {name: as_raw("F64", value) for name, value in weights.items()}
    write_raw(wide / "model.safetensors", raw)
    tokens = mx.array([[1, 5, 9]])
    expected = to_numpy(load(base)[0](tokens))
    assert np.array_equal(to_numpy(load(wide)[0](tokens)), expected)
    with use_in_mlx_lm():
        import mlx_lm

        model = mlx_lm.load(str(wide))[0]
    assert np.array_equal(to_numpy(model(tokens)), expected)
    merge_models([base, wide], save_path=tmp_path / "m", method="linear")
    merged = mx.load(str(tmp_path / "m" / "model.safetensors"))
    assert isinstance(merged, dict)
    for name, value in weights.items():
        assert merged[name].dtype == mx.float32
        assert np.allclose(np.array(merged[name]), np.array(value), 1e-6, 0)


@pytest.mark.parametrize("scaled", [False, True])
def test_float8_that_mlx_lm_would_read_as_integers_is_refused(
    make_tiny_folder: Callable[..., Path], scaled: bool
) -> None:
    folder = make_tiny_folder("model")
    weights = mx.load(str(folder / "model.safetensors"))
    assert isinstance(weights, dict)
    raw = {name: as_raw("F32", value) for name, value in weights.items()}
    name = "model.layers.0.mlp.down_proj.weight"
    shape = raw[name][1]
    raw[name] = "F8_E4M3", shape, bytes(np.prod(shape, dtype=int))
    if scaled:
        raw[f"{name}_scale_inv"] = "F32", (1, 1), struct.pack("<f", 1.0)
    write_raw(folder / "model.safetensors", raw)
    for read in (load, lambda path: Checkpoint(path)):
        with pytest.raises(DoRAError, match=rf"{name}.*float8.*dequantize"):
            read(folder)
    with use_in_mlx_lm(), pytest.raises(DoRAError, match="float8"):
        import mlx_lm

        mlx_lm.load(str(folder))


def test_float8_with_scales_is_accepted_where_the_host_unpacks_it(
    tmp_path: Path,
) -> None:
    tensors = {"x.weight": zeros("F8_E4M3"), "x.weight_scale_inv": zeros("F32")}
    infos = read_header(write_raw(tmp_path / "a.safetensors", tensors))
    check_dtypes(tmp_path, infos, host_unpacks=True)
    with pytest.raises(DoRAError, match=r"first with x\.weight_scale_inv"):
        check_dtypes(tmp_path, infos)


def test_differing_counters_are_not_averaged(
    make_tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folders = [make_tiny_folder(name) for name in "ab"]
    for i, folder in enumerate(folders):
        weights = mx.load(str(folder / "model.safetensors"))
        assert isinstance(weights, dict)
        weights["model.norm.num_batches_tracked"] = mx.array([i])
        mx.save_safetensors(str(folder / "model.safetensors"), weights)
    with pytest.raises(DoRAError, match="num_batches_tracked holds integers that"):
        merge_models(folders, save_path=tmp_path / "m", method="linear")


def test_an_adapter_of_half_precision_still_attaches(
    adapter_folder: Path, tiny_model_folder: Path
) -> None:
    adapter = load_adapter(adapter_folder)
    half = {name: value.astype(mx.bfloat16) for name, value in adapter.tensors.items()}
    mx.save_safetensors(str(adapter_folder / "adapters.safetensors"), half)
    model, _ = load(tiny_model_folder)
    assert attach_adapter(model, load_adapter(adapter_folder))
