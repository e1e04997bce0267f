"""Everything we save loads under mlx-swift-lm's rules, or saving says that it won't."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_dora.adapters.config import DoRAConfig
from mlx_dora.adapters.files import load_adapter, save_adapter, write_adapter_files
from mlx_dora.adapters.hosting import load
from mlx_dora.adapters.key_form import key_form
from mlx_dora.adapters.keys import natural_order, resolve_keys
from mlx_dora.adapters.surgery import apply_dora
from mlx_dora.demo import script
from mlx_dora.fuse.config import FuseConfig
from mlx_dora.fuse.model import fuse_model
from mlx_dora.merge import merge_adapters
from mlx_dora.merge.adapters.extract import extract_adapter
from mlx_dora.peft import convert_adapter
from tests.adapters.folders import edit_config, read_config
from tests.adapters.swift_host import LINEARS, SwiftError, swift_load
from tests.adapters.training import QV, perturb, train
from tests.compat.tiny_models import build
from tests.hosts import ran

MakeModel = Callable[..., nn.Module]
MakeFolder = Callable[..., Path]
ALIKE = {
    "queries and values": DoRAConfig(num_layers=2, keys=QV),
    "every linear": DoRAConfig(num_layers=-1, rank=4),
    "the last block": DoRAConfig(num_layers=1),
    "full paths": DoRAConfig(
        keys=tuple(f"model.layers.{i}.mlp.{n}_proj" for i in (0, 1) for n in ("up",))
    ),
    "ranks by module, padded": DoRAConfig(
        num_layers=2, keys=QV, rank=2, rank_pattern={"v_proj": 5}
    ),
}
NOT_ALIKE = {
    "embedding": (
        DoRAConfig(num_layers=2, keys=(QV[0], "model.embed_tokens")),
        "modules outside the blocks are adapted: model.embed_tokens",
    ),
    "first block": (
        DoRAConfig(keys=(f"model.layers.0.{QV[0]}",)),
        f"the last 2 blocks are not adapted alike: without model.layers.1.{QV[0]}",
    ),
    "other modules": (
        DoRAConfig(keys=(f"model.layers.0.{QV[0]}", f"model.layers.1.{QV[1]}")),
        "not adapted alike",
    ),
}


def all_used(model: nn.Module, folder: Path) -> int:
    """The number of tensors in a folder, all of which Swift takes."""
    loaded = swift_load(model, folder)
    stored = mx.load(str(folder / "adapters.safetensors"))
    assert isinstance(stored, dict)
    assert loaded.used == sorted(stored)
    assert loaded.unset == []
    assert read_config(folder)["num_layers"] > 0
    return len(stored)


@pytest.mark.parametrize("kind", ["dora", "lora"])
@pytest.mark.parametrize("bits", [None, 4, 6])
@pytest.mark.parametrize("name", ALIKE)
def test_swift_takes_every_tensor(
    make_tiny_model: MakeModel,
    tmp_path: Path,
    name: str,
    bits: int | None,
    kind: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = make_tiny_model(bits=bits)
    train(model, ALIKE[name], kind)
    save_adapter(model, tmp_path / "saved")
    write_adapter_files(model, tmp_path / "written")
    for folder in (tmp_path / "saved", tmp_path / "written"):
        assert all_used(make_tiny_model(bits=bits), folder) > 0
        assert all("." in key for key in read_config(folder)["lora_parameters"]["keys"])
    assert "mlx-swift-lm" not in caplog.text


@pytest.mark.parametrize("name", NOT_ALIKE)
def test_saving_says_what_swift_refuses(
    make_tiny_model: MakeModel,
    tmp_path: Path,
    name: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config, reason = NOT_ALIKE[name]
    model = make_tiny_model()
    train(model, config)
    with caplog.at_level(logging.WARNING):
        save_adapter(model, tmp_path / "a")
    assert "mlx-swift-lm (iOS, macOS) cannot load this adapter" in caplog.text
    assert reason in caplog.text
    with pytest.raises(SwiftError, match="Unhandled keys"):
        swift_load(make_tiny_model(), tmp_path / "a")
    assert read_config(tmp_path / "a")["num_layers"] > 0
    caplog.clear()
    with caplog.at_level(logging.WARNING):  # also of an adapter without its model
        save_adapter(load_adapter(tmp_path / "a"), tmp_path / "b")
    assert "mlx-swift-lm" in caplog.text


def test_swift_takes_none_of_full_paths(
    make_tiny_model: MakeModel, tmp_path: Path
) -> None:
    """The form that mlx_dora wrote up to 0.2."""
    model = make_tiny_model()
    train(model)
    save_adapter(model, tmp_path / "a")
    parameters = read_config(tmp_path / "a")["lora_parameters"]
    full = [f"model.layers.{i}.{key}" for i in (0, 1) for key in QV]
    edit_config(tmp_path / "a", lora_parameters={**parameters, "keys": full})
    with pytest.raises(SwiftError, match="of 12"):
        swift_load(make_tiny_model(), tmp_path / "a")
    assert len(load_adapter(tmp_path / "a").paths) == 4  # we read both forms


@pytest.fixture
def bases(make_tiny_folder: MakeFolder) -> tuple[Path, Path]:
    """A base, and a model tuned from it."""
    return make_tiny_folder("base"), make_tiny_folder("tuned", seed=1)


def saved_adapter(base: Path, folder: Path, seed: int = 0, **config: Any) -> Path:
    model, _ = load(base)
    mx.random.seed(seed)
    apply_dora(model, DoRAConfig(**{"num_layers": 1, "keys": QV, **config}))
    perturb(model, 0.02 + 0.01 * seed)
    save_adapter(model, folder, base_model=str(base))
    return folder


def test_swift_takes_what_merge_extract_and_fuse_write(
    bases: tuple[Path, Path], make_tiny_folder: MakeFolder, tmp_path: Path
) -> None:
    base, tuned = bases
    model, _ = load(base)
    one = saved_adapter(base, tmp_path / "one")
    two = saved_adapter(base, tmp_path / "two", 1, num_layers=2)
    merge_adapters([one, one], model=base, save_path=tmp_path / "same")
    assert all_used(model, tmp_path / "same") == 6
    merge_adapters([one], model=base, save_path=tmp_path / "only")
    assert all_used(model, tmp_path / "only") == 6
    merge_adapters([one, two], model=base, save_path=tmp_path / "merged")
    assert all_used(model, tmp_path / "merged") == 12
    extract_adapter(base, tuned, rank=3, save_path=tmp_path / "extracted")
    assert all_used(model, tmp_path / "extracted") == 42
    packed = make_tiny_folder("packed", bits=4)
    adapter = saved_adapter(packed, tmp_path / "packed_adapter")
    fuse_model(packed, adapter, tmp_path / "fused", config=FuseConfig(mode="lossless"))
    rest = next((tmp_path / "fused").rglob("adapters.safetensors")).parent
    assert all_used(load(packed)[0], rest) == 4


@pytest.mark.parametrize("model", [True, False], ids=["with model", "without"])
def test_swift_takes_what_comes_from_peft(
    bases: tuple[Path, Path], tmp_path: Path, model: bool
) -> None:
    base, _ = bases
    saved_adapter(base, tmp_path / "one", num_layers=2)
    convert_adapter(tmp_path / "one", tmp_path / "peft", "peft")
    given = base if model else None
    convert_adapter(tmp_path / "peft", tmp_path / "back", "mlx", model=given)
    assert all_used(load(base)[0], tmp_path / "back") == 12
    # As PEFT itself writes it: no metadata of ours, and modules by their last names.
    file = str(tmp_path / "peft" / "adapter_model.safetensors")
    tensors = mx.load(file)
    assert isinstance(tensors, dict)
    mx.eval(tensors)
    mx.save_safetensors(file, tensors)
    path = tmp_path / "peft" / "adapter_config.json"
    config = json.loads(path.read_text()) | {"target_modules": ["q_proj", "v_proj"]}
    path.write_text(json.dumps(config))
    convert_adapter(tmp_path / "peft", tmp_path / "theirs", "mlx", model=given)
    assert all_used(load(base)[0], tmp_path / "theirs") == 12
    # One block only: the number of blocks is known from the model alone.
    path.write_text(json.dumps(config | {"layers_to_transform": [1]}))
    mx.save_safetensors(file, {k: v for k, v in tensors.items() if ".layers.1." in k})
    convert_adapter(tmp_path / "peft", tmp_path / "last", "mlx", model=given)
    if model:
        assert all_used(load(base)[0], tmp_path / "last") == 6
    else:
        with pytest.raises(SwiftError, match="Unhandled keys"):
            swift_load(load(base)[0], tmp_path / "last")


def test_mlx_adapter_of_the_old_form_converts_with_its_model(
    bases: tuple[Path, Path], tmp_path: Path
) -> None:
    base, _ = bases
    one = saved_adapter(base, tmp_path / "one", num_layers=2)
    parameters = read_config(one)["lora_parameters"]
    full = [f"model.layers.{i}.{key}" for i in (0, 1) for key in QV]
    edit_config(one, num_layers=-1, lora_parameters={**parameters, "keys": full})
    convert_adapter(one, tmp_path / "new", "mlx", model=base)
    assert all_used(load(base)[0], tmp_path / "new") == 12
    for name in ("adapters.safetensors",):
        old, new = mx.load(str(one / name)), mx.load(str(tmp_path / "new" / name))
        assert isinstance(old, dict) and isinstance(new, dict)
        assert all(mx.array_equal(old[key], new[key]) for key in old | new)


def test_num_layers_of_mlx_lm_becomes_positive(
    bases: tuple[Path, Path], tmp_path: Path
) -> None:
    base, _ = bases
    one = saved_adapter(base, tmp_path / "one", num_layers=2)
    for depth in (-1, 0):
        edit_config(one, num_layers=depth)
        save_adapter(load_adapter(one), tmp_path / f"again{depth}")
        assert read_config(tmp_path / f"again{depth}")["num_layers"] == 2
        assert all_used(load(base)[0], tmp_path / f"again{depth}") == 12


@pytest.mark.real_model
def test_swift_takes_all_168_tensors_of_the_demos_adapter(
    smollm: Path, tmp_path: Path
) -> None:
    model, _ = load(smollm, lazy=True)
    adapted, _ = load(smollm, lazy=True)
    config = DoRAConfig(
        rank=script.RANK, scale=script.SCALE, num_layers=script.ADAPTED_BLOCKS
    )
    apply_dora(adapted, config)
    save_adapter(adapted, tmp_path / "a")
    assert all_used(model, tmp_path / "a") == 168
    what = "its rules of loading, in Python: 168 of 168 tensors of the demo's adapter"
    ran("mlx-swift-lm", what, version="commit 1441444 (not run)")


@pytest.mark.parametrize(
    "kind", ["qwen3_next", "granitemoehybrid", "lfm2", "jamba", "deepseek_v2", "gpt2"]
)
@pytest.mark.parametrize("depth", [2, -1])
def test_models_of_mixed_blocks_have_relative_keys(kind: str, depth: int) -> None:
    """Blocks differ there: attention or not, dense or experts."""
    model = build(kind)
    every = resolve_keys(model, None, depth)
    modules = dict(model.named_modules())
    paths = [path for path in every if isinstance(modules[path], LINEARS)]
    form = key_form(model, paths)
    assert form.why_full == ""
    assert resolve_keys(model, form.keys, form.num_layers) == paths
    assert not any(key.startswith(("model", "transformer")) for key in form.keys)
    fewer = key_form(model, paths[:-1])  # the last module of the last block is missing
    assert paths[-1] in fewer.why_full or resolve_keys(
        model, fewer.keys, fewer.num_layers
    ) == sorted(paths[:-1], key=natural_order)
