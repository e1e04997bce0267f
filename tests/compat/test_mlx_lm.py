"""mlx-lm loads our adapters, we load mlx-lm's, and the outputs agree."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlx_dora.adapters.config import DoRAConfig
from mlx_dora.adapters.files import save_adapter
from mlx_dora.adapters.hosting import load
from mlx_dora.adapters.surgery import dora_layers
from mlx_dora.errors import DoRAError
from tests.adapters.training import QV, TOKENS, perturb, train
from tests.checks import BOUNDS, assert_close, to_numpy
from tests.hosts import ran
from tests.processes import run

MakeFolder = Callable[..., Path]
CONFIGS = {
    "every linear": DoRAConfig(num_layers=-1, rank=4),
    "last block": DoRAConfig(num_layers=1),
    "single ranks": DoRAConfig(
        num_layers=2, keys=QV, rank=2, rank_pattern={"v_proj": 5}
    ),
    "single scales": DoRAConfig(
        num_layers=2, keys=QV, rank=2, rank_pattern={"v_proj": 5}, use_rslora=True
    ),
    "embedding": DoRAConfig(num_layers=1, keys=(QV[0], "model.embed_tokens")),
}


def trained(base: Path, adapter: Path, config: DoRAConfig, kind: str = "dora") -> None:
    model, _ = load(base)
    train(model, config, kind)
    save_adapter(model, adapter)


def host_load(base: Path, adapter: Path) -> nn.Module:
    return mlx_lm.load(str(base), adapter_path=str(adapter))[0]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    "base", [{}, {"bits": 4}, {"bits": 8}, {"dtype": mx.bfloat16}], ids=str
)
def test_mlx_lm_says_the_same_with_our_adapter(
    make_tiny_folder: MakeFolder, tmp_path: Path, name: str, base: dict
) -> None:
    if name == "embedding" and base:
        pytest.skip("stock mlx-lm: quantised embeddings crash, bfloat16 ones widen")
    folder = make_tiny_folder("base", **base)
    trained(folder, tmp_path / "adapter", CONFIGS[name])
    ours, _ = load(folder, tmp_path / "adapter")
    theirs = host_load(folder, tmp_path / "adapter")
    assert dora_layers(theirs) == []
    adapted = {p for p, m in theirs.named_modules() if type(m).__name__ == "DoRALinear"}
    expected = {p for p, _ in dora_layers(ours)} - {"model.embed_tokens"}
    assert adapted == expected
    dtype = base.get("dtype", mx.float32)
    # Stock mlx-lm rounds g to bfloat16, once a layer.
    bound = 1e-5 if dtype == mx.float32 else 4 * BOUNDS[dtype]
    assert_close(theirs(TOKENS), to_numpy(ours(TOKENS)), bound=bound)
    ran("mlx-lm", "DoRA on dense, 4-bit and 8-bit bases: its logits", package="mlx-lm")


def test_mlx_lm_loads_our_lora(make_tiny_folder: MakeFolder, tmp_path: Path) -> None:
    folder = make_tiny_folder("base")
    trained(folder, tmp_path / "adapter", CONFIGS["single ranks"], "lora")
    ours, _ = load(folder, tmp_path / "adapter")
    theirs = host_load(folder, tmp_path / "adapter")
    assert_close(theirs(TOKENS), to_numpy(ours(TOKENS)))
    ran("mlx-lm", "LoRA: its logits", package="mlx-lm")


@pytest.mark.parametrize("kind", ["dora", "lora"])
@pytest.mark.parametrize(
    ("num_layers", "keys"), [(1, None), (-1, None), (0, None), (2, list(QV))]
)
def test_we_load_what_mlx_lm_writes(
    make_tiny_folder: MakeFolder,
    tmp_path: Path,
    kind: str,
    num_layers: int,
    keys: list[str] | None,
) -> None:
    folder = make_tiny_folder("base")
    theirs = mlx_lm.load(str(folder))[0]
    parameters = {"rank": 4, "alpha": 9, "scale": 10.0, "dropout": 0.0}
    if keys is not None:
        parameters["keys"] = keys  # pyright: ignore[reportArgumentType]
    theirs.freeze()
    linear_to_lora_layers(theirs, num_layers, parameters, use_dora=kind == "dora")
    perturb(theirs)
    theirs.eval()
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    weights = dict(tree_flatten(theirs.trainable_parameters()))
    mx.save_safetensors(str(adapter / "adapters.safetensors"), weights)  # pyright: ignore[reportArgumentType]
    config = {
        "fine_tune_type": kind,
        "num_layers": num_layers,
        "lora_parameters": parameters,
        "model": str(folder),
    }
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    ours, _ = load(folder, adapter)
    assert_close(ours(TOKENS), to_numpy(theirs(TOKENS)))
    if kind == "dora":
        save_adapter(ours, tmp_path / "again")
        assert_close(
            host_load(folder, tmp_path / "again")(TOKENS), to_numpy(theirs(TOKENS))
        )


def test_module_that_keys_name_must_have_tensors(
    make_tiny_folder: MakeFolder, tmp_path: Path
) -> None:
    folder = make_tiny_folder("base")
    trained(folder, tmp_path / "a", CONFIGS["last block"])
    path = tmp_path / "a" / "adapter_config.json"
    config = json.loads(path.read_text())
    del config["mlx_dora"], config["lora_parameters"]["keys"]
    config["num_layers"] = 2
    path.write_text(json.dumps(config))
    assert_close(
        load(folder, tmp_path / "a")[0](TOKENS),
        to_numpy(host_load(folder, tmp_path / "a")(TOKENS)),
    )
    config["lora_parameters"]["keys"] = ["mlp.up_proj", "mlp.down_proj"]
    path.write_text(json.dumps(config))
    with pytest.raises(DoRAError, match=r"that have no tensors: model\.layers\.0\.mlp"):
        load(folder, tmp_path / "a")


def run_host(command: str, *args: object) -> subprocess.CompletedProcess[str]:
    return run(["-m", "mlx_lm", command, *args])


def test_mlx_lms_commands_take_our_adapter(
    make_tiny_folder: MakeFolder, tmp_path: Path
) -> None:
    folder = make_tiny_folder("base")
    trained(folder, tmp_path / "adapter", CONFIGS["every linear"])
    inputs = ("--model", folder, "--adapter-path", tmp_path / "adapter")
    result = run_host("generate", *inputs, "--prompt", "the fox", "--max-tokens", 4)
    assert result.returncode == 0, result.stderr
    assert "4 tokens" in result.stdout
    result = run_host("fuse", *inputs, "--save-path", tmp_path / "fused")
    assert result.returncode == 0, result.stderr
    ours, _ = load(folder, tmp_path / "adapter")
    fused, _ = load(tmp_path / "fused")
    assert_close(fused(TOKENS), to_numpy(ours(TOKENS)))
