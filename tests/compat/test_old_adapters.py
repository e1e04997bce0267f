"""Adapter folders of earlier mlx-lm releases load as stock mlx-lm loads them.

The numbers in the names are those of the public reports.
"""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest

from mlx_dora.adapters.config import DoRAConfig
from mlx_dora.adapters.files import load_adapter, save_adapter
from mlx_dora.adapters.hosting import load
from mlx_dora.adapters.named import NamedAdapters
from mlx_dora.analyze import analyze_adapter
from mlx_dora.fuse.model import fuse_model
from mlx_dora.merge import merge_adapters
from mlx_dora.peft import from_peft
from mlx_dora.peft.convert import convert_adapter
from tests.adapters.training import QV, TOKENS, train
from tests.checks import assert_close, to_numpy

MakeFolder = Callable[..., Path]
RANK, SCALE = 4, 5.0


def write_adapter(folder: Path, base: Path, kind: str, **config: Any) -> Path:
    """Train an adapter of query and value, with the config of another time."""
    model, _ = load(base)
    train(model, DoRAConfig(rank=RANK, scale=SCALE, num_layers=2, keys=QV), kind)
    save_adapter(model, folder)
    parameters = {"rank": RANK, "dropout": 0.0, "scale": SCALE, "keys": list(QV)}
    parameters |= config.pop("lora_parameters", {})
    parameters = {k: v for k, v in parameters.items() if v is not None}
    content = {"lora_parameters": parameters, "model": str(base), **config}
    (folder / "adapter_config.json").write_text(json.dumps(content))
    return folder


def stock_logits(base: Path, adapter: Path | None) -> np.ndarray:
    path = None if adapter is None else str(adapter)
    return to_numpy(mlx_lm.load(str(base), adapter_path=path)[0](TOKENS))


def logits(model: nn.Module) -> mx.array:
    return model(TOKENS)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_adapter_without_keys_loads_as_stock_does__mlx_swift_examples_405(
    make_tiny_folder: MakeFolder, tmp_path: Path, kind: str
) -> None:
    base = make_tiny_folder("base")
    adapter = write_adapter(
        tmp_path / "a", base, kind,
        fine_tune_type=kind, num_layers=2, lora_parameters={"keys": None},
    )  # fmt: skip
    expected = stock_logits(base, adapter)
    change = np.abs(expected - stock_logits(base, None)).max()
    assert change > 0.05
    assert_close(logits(load(base, adapter)[0]), expected)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_every_command_takes_an_adapter_without_keys__mlx_swift_examples_405(
    make_tiny_folder: MakeFolder, tmp_path: Path, kind: str
) -> None:
    base = make_tiny_folder("base")
    adapter = write_adapter(
        tmp_path / "a", base, kind,
        fine_tune_type=kind, num_layers=2, lora_parameters={"keys": None},
    )  # fmt: skip
    expected = stock_logits(base, adapter)

    fuse_model(base, adapter, tmp_path / "fused")
    assert_close(logits(load(tmp_path / "fused")[0]), expected)

    merged = merge_adapters([adapter], model=base)
    save_adapter(merged, tmp_path / "merged")
    assert_close(logits(load(base, tmp_path / "merged")[0]), expected)

    assert len(analyze_adapter(adapter, base).layers) == 4

    convert_adapter(adapter, tmp_path / "peft", "peft")
    save_adapter(from_peft(tmp_path / "peft"), tmp_path / "back")
    assert_close(logits(load(base, tmp_path / "back")[0]), expected)

    model, _ = load(base)
    named = NamedAdapters(model)
    named.add("old", adapter)
    named.set_adapter("old")
    assert_close(logits(model), expected)


def test_tensor_beyond_num_layers_is_still_refused(
    make_tiny_folder: MakeFolder, tmp_path: Path
) -> None:
    base = make_tiny_folder("base")
    adapter = write_adapter(
        tmp_path / "a", base, "lora",
        fine_tune_type="lora", num_layers=1, lora_parameters={"keys": None},
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"not an adapter parameter"):
        stock_logits(base, adapter)
    with pytest.raises(ValueError, match=r"does not adapt: model.layers.0.self_attn"):
        load(base, adapter)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_lora_layers_and_use_dora_are_read__mlx_1463(
    make_tiny_folder: MakeFolder, tmp_path: Path, kind: str
) -> None:
    base = make_tiny_folder("base")
    early = {"lora_layers": 2, "use_dora": kind == "dora"}
    late = {"num_layers": 2, "fine_tune_type": kind}
    expected = stock_logits(base, write_adapter(tmp_path / "late", base, kind, **late))
    adapter = write_adapter(tmp_path / "early", base, kind, **early)
    assert load_adapter(adapter).fine_tune_type == kind
    assert_close(logits(load(base, adapter)[0]), expected)


def test_fine_tune_type_beats_a_left_over_use_dora(
    make_tiny_folder: MakeFolder, tmp_path: Path
) -> None:
    base = make_tiny_folder("base")
    adapter = write_adapter(
        tmp_path / "a", base, "lora",
        num_layers=2, fine_tune_type="lora", use_dora=True,
    )  # fmt: skip
    assert_close(logits(load(base, adapter)[0]), stock_logits(base, adapter))


def test_alpha_beside_scale_is_named__mlx_examples_622(
    make_tiny_folder: MakeFolder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = make_tiny_folder("base")
    config = {"lora_layers": 2, "lora_parameters": {"alpha": 8, "scale": 10.0}}
    adapter = write_adapter(tmp_path / "a", base, "lora", **config)
    with caplog.at_level(logging.WARNING, logger="mlx_dora"):
        loaded = load_adapter(adapter)
    assert loaded.config.scale == 10
    (record,) = caplog.records
    assert "alpha 8 is ignored" in record.getMessage()
    assert "scale * alpha / rank = 20:" in record.getMessage()
    assert str(adapter) in record.getMessage()


def test_alpha_that_changes_nothing_is_not_named(
    make_tiny_folder: MakeFolder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = make_tiny_folder("base")
    config = {"num_layers": 2, "lora_parameters": {"alpha": RANK}}
    adapter = write_adapter(tmp_path / "a", base, "lora", **config)
    with caplog.at_level(logging.WARNING, logger="mlx_dora"):
        load_adapter(adapter)
    assert caplog.records == []


@pytest.mark.parametrize("keys", [list(QV), None])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_num_layers_above_the_models_loads_as_stock_does__mlx_examples_1328(
    make_tiny_folder: MakeFolder, tmp_path: Path, kind: str, keys: list[str] | None
) -> None:
    base = make_tiny_folder("base")
    adapter = write_adapter(
        tmp_path / "a", base, kind,
        num_layers=16, fine_tune_type=kind, lora_parameters={"keys": keys},
    )  # fmt: skip
    expected = stock_logits(base, adapter)
    assert_close(logits(load(base, adapter)[0]), expected)
    fuse_model(base, adapter, tmp_path / "fused")
    assert_close(logits(load(tmp_path / "fused")[0]), expected)
