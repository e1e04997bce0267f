"""A folder of `to_peft` under the rules by which vLLM reads one; vLLM is not run.

Written from vLLM's ``lora/peft_helper.py`` (required settings), ``lora/utils.py``
(`parse_fine_tuned_lora_name`) and the description of its pull request 47395 (DoRA: a
``lora_magnitude_vector`` for each pair, on dense linear layers).
"""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_dora.adapters.adapter import take_adapter
from mlx_dora.adapters.config import DoRAConfig
from mlx_dora.peft import to_peft
from tests.adapters.training import QV, train
from tests.hosts import ran

Make = Callable[..., nn.Module]
PREFIX = "base_model.model."


class RefusedError(Exception):
    """What vLLM raises."""


def vllm_read(folder: Path, *, dora: bool) -> dict[str, dict[str, mx.array]]:
    """Return the tensors by module and part, or raise what vLLM raises."""
    config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    if missing := {"r", "lora_alpha", "target_modules"} - config.keys():
        raise RefusedError(f"Missing required configuration fields: {missing}")
    if config.get("modules_to_save") or config.get("bias", "none") != "none":
        raise RefusedError("modules_to_save, bias")
    if config.get("use_dora") and not dora:
        raise RefusedError("vLLM does not yet support DoRA.")
    tensors = mx.load(str(folder / "adapter_model.safetensors"))
    assert isinstance(tensors, dict)
    modules: dict[str, dict[str, mx.array]] = {}
    for name, value in tensors.items():
        parts = name.removeprefix(PREFIX).split(".")
        if parts[-1] == "weight" and parts[-2] in ("lora_A", "lora_B"):
            module, part = ".".join(parts[:-2]), parts[-2]
        elif parts[-1] == "lora_magnitude_vector" and config.get("use_dora"):
            module, part = ".".join(parts[:-1]), parts[-1]
        else:
            raise RefusedError(f"{name} is unsupported LoRA weight")
        modules.setdefault(module, {})[part] = value
    wanted = {"lora_A", "lora_B"} | (
        {"lora_magnitude_vector"} if config.get("use_dora") else set()
    )
    targets = {target.rpartition(".")[2] for target in config["target_modules"]}
    for module, found in modules.items():
        if found.keys() != wanted or module.rpartition(".")[2] not in targets:
            raise RefusedError(f"{module} has {sorted(found)}")
        ranks = found["lora_A"].shape[0], found["lora_B"].shape[1]
        if ranks != (config["r"], config["r"]):  # it scales by lora_alpha / r
            raise RefusedError(f"{module} has rank {ranks}, not {config['r']}")
        rows = found["lora_B"].shape[0]
        if "lora_magnitude_vector" in found and (
            found["lora_magnitude_vector"].shape != (rows,)
        ):
            raise RefusedError(f"{module} has a magnitude of another length")
    return modules


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_vllm_accepts_the_folder(
    tiny_model: nn.Module,
    tmp_path: Path,
    kind: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    train(tiny_model, DoRAConfig(num_layers=2, keys=QV, rank=4, scale=3.0), kind)
    adapter = take_adapter(tiny_model)
    to_peft(adapter, tmp_path / "p", base_model_name_or_path="org/name")
    modules = vllm_read(tmp_path / "p", dora=True)
    assert sorted(modules) == sorted(adapter.paths)
    config = json.loads((tmp_path / "p" / "adapter_config.json").read_text())
    assert config["lora_alpha"] / config["r"] == pytest.approx(3.0)
    assert "vLLM" not in caplog.text
    if kind == "dora":
        with pytest.raises(RefusedError, match="does not yet support"):
            vllm_read(tmp_path / "p", dora=False)
    what = "format of the folder (LoRA; DoRA as its pull request 47395 reads it)"
    ran("vLLM", what, version="not run")


def test_ranks_by_module_are_warned_of(
    tiny_model: nn.Module, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = DoRAConfig(num_layers=2, keys=QV, rank=4, rank_pattern={"v_proj": 2})
    train(tiny_model, config)
    with caplog.at_level(logging.WARNING):
        to_peft(take_adapter(tiny_model), tmp_path / "p")
    assert "vLLM reads one r and one lora_alpha" in caplog.text
    with pytest.raises(RefusedError, match="has rank"):
        vllm_read(tmp_path / "p", dora=True)
