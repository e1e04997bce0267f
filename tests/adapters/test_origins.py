"""A lazily loaded base is sampled in its files, with the values it would have."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_dora import DoRAConfig, apply_dora, save_adapter
from mlx_dora.adapters import model_view
from mlx_dora.adapters.fingerprint import base_tensors, fingerprint
from mlx_dora.adapters.hosting import load, load_lazily
from mlx_dora.adapters.keys import natural_order
from mlx_dora.adapters.origins import Origins, origins_of
from mlx_dora.analyze import analyze_adapter
from mlx_dora.io.header import read_header

MakeFolder = Callable[..., Path]
DTYPES = {"F32": ("float32", 4), "BF16": ("bfloat16", 2), "U32": ("uint32", 4)}


def by_definition(folder: Path) -> str:
    """The fingerprint of a model from the bytes of its only file."""
    path = folder / "model.safetensors"
    infos, data = read_header(path), path.read_bytes()
    names = sorted(infos, key=natural_order)
    digest = hashlib.sha256()
    for name in names:
        line = [
            name,
            list(infos[name].shape),
            f"mlx.core.{DTYPES[infos[name].dtype][0]}",
        ]
        digest.update(json.dumps(line).encode() + b"\n")
    matrices = [name for name in names if len(infos[name].shape) > 1]
    places = range(len(matrices))
    if len(matrices) > 16:
        places = [round(i * (len(matrices) - 1) / 15) for i in range(16)]
    for place in places:
        info = infos[matrices[place]]
        width = DTYPES[info.dtype][1]
        values = np.frombuffer(data[info.start : info.end], f"V{width}")
        digest.update(values[:: max(1, values.size // 256)][:256].tobytes())
    return f"sha256:{digest.hexdigest()}"


@pytest.mark.parametrize(
    "kind", [{}, {"dtype": mx.bfloat16}, {"bits": 4}, {"num_hidden_layers": 5}]
)
def test_fingerprint_is_the_same_from_files_and_from_memory(
    make_tiny_folder: MakeFolder, kind: dict
) -> None:
    folder = make_tiny_folder(**kind)
    assert fingerprint(load_lazily(folder)) == by_definition(folder)
    assert fingerprint(load(folder)[0]) == by_definition(folder)


def test_fingerprint_of_an_earlier_version(make_tiny_folder: MakeFolder) -> None:
    """Adapters saved by 0.1 keep fitting their bases."""
    folder = make_tiny_folder()
    path = folder / "model.safetensors"
    weights = mx.load(str(path))
    assert isinstance(weights, dict)
    count = 0.0
    for name in sorted(weights):
        size, shape = weights[name].size, weights[name].shape
        weights[name] = (mx.arange(size) / 64 + count).reshape(shape)
        count += 1
    mx.save_safetensors(str(path), weights)
    assert fingerprint(load_lazily(folder)) == (
        "sha256:555e4b7866aed73b643724303cb3dc66299b2429df9e3ed357be0d4111919def"
    )


def test_sampling_reads_no_tensor(make_tiny_folder: MakeFolder) -> None:
    model = load_lazily(make_tiny_folder(hidden_size=512, num_hidden_layers=4))
    before = mx.get_active_memory()
    fingerprint(model)
    assert mx.get_active_memory() == before
    origins = origins_of(model)
    assert all(origins.stored(tensor) for tensor in base_tensors(model).values())


def test_values_changed_in_place_are_not_taken_from_the_file(
    make_tiny_folder: MakeFolder,
) -> None:
    """`array *= 2` keeps the array's identity, as in mlx-lm's falcon_h1."""
    folder = make_tiny_folder()
    model = load_lazily(folder)
    layer = model["model"].layers[1].mlp.down_proj
    weight = layer.weight
    weight *= 2
    assert layer.weight is weight
    assert origins_of(model).stored(weight) is None
    changed = load(folder)[0]
    changed["model"].layers[1].mlp.down_proj.weight *= 2
    assert fingerprint(model) == fingerprint(changed) != by_definition(folder)


def test_arrays_that_the_model_made_have_no_origin(
    make_tiny_folder: MakeFolder,
) -> None:
    model = load_lazily(make_tiny_folder())
    weight = model["model"].embed_tokens.weight
    assert origins_of(model).stored(weight) is not None
    for other in (weight.T, weight[:], mx.zeros(3)):
        assert origins_of(model).stored(other) is None
    mx.eval(weight)  # in memory already
    assert origins_of(model).stored(weight) is None
    assert isinstance(origins_of(nn.Module()), Origins)


def test_origins_hold_no_array(make_tiny_folder: MakeFolder) -> None:
    model = load_lazily(make_tiny_folder())
    origins = origins_of(model)
    names = [name for name, _ in tree_flatten(model.parameters())]
    before = mx.get_active_memory()
    mx.eval(model.parameters())
    assert mx.get_active_memory() > before
    modules = model.modules()
    while modules:
        modules.pop().clear()
    del model
    assert mx.get_active_memory() == before
    assert names and origins is not None


@pytest.mark.parametrize("job", ["lazily", "load", "analyze"])
def test_headers_are_read_once(
    make_tiny_folder: MakeFolder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    job: str,
) -> None:
    folder = make_tiny_folder()
    model = load_lazily(folder)
    apply_dora(model, DoRAConfig(num_layers=-1))
    save_adapter(model, tmp_path / "adapter")
    read: list[Path] = []

    def counted(path: Path) -> object:
        read.append(path)
        return read_header(path)

    monkeypatch.setattr(model_view, "read_header", counted)
    if job == "lazily":
        load_lazily(folder)
    elif job == "load":
        load(folder)
    else:
        analyze_adapter(tmp_path / "adapter", folder)
    assert read == [folder / "model.safetensors"]
