"""One of everything that a command reads, tiny, in one folder."""

import json
from pathlib import Path

import mlx.core as mx
import yaml
from mlx.utils import tree_flatten
from mlx_lm.models import llama

from mlx_dora import DoRAConfig, apply_dora, save_adapter
from mlx_dora.layers import DoRALinear
from mlx_dora.merge.fisher.config import FisherConfig
from mlx_dora.merge.fisher.estimate import write_fisher
from mlx_dora.peft import to_peft
from tests.cli.training_data import write_data
from tests.conftest import TINY_CONFIG, write_tiny_tokenizer


def make_material(folder: Path, *, fisher: bool = True) -> Path:
    """Make models ``m0`` and ``m1``, adapters ``a1`` and ``a2`` of ``m0``, and so on.

    Args:
        folder: Made; any name.
        fisher: Make the folders of Fisher information ``f0`` and ``f1`` too.

    Returns:
        `folder`.
    """
    folder.mkdir(parents=True)
    for seed, name in enumerate(("m0", "m1")):
        _write_model(folder / name, seed)
    for seed, name in enumerate(("a1", "a2"), start=1):
        _write_adapter(folder, name, seed)
    to_peft(folder / "a1", folder / "peft", base_model_name_or_path="base")
    write_data(folder / "data", train=8, valid=4, test=4)
    mergekit = {
        "merge_method": "linear",
        "models": [{"model": str(folder / "m0")}, {"model": str(folder / "m1")}],
        "parameters": {"weight": 0.5},
    }
    (folder / "settings").mkdir()
    (folder / "settings" / "merge.yaml").write_text(yaml.safe_dump(mergekit))
    if fisher:
        config = FisherConfig(data=str(folder / "data"), num_batches=1)
        for name, model in (("f0", "m0"), ("f1", "m1")):
            write_fisher(folder / model, folder / name, config=config)
    return folder


def _build(seed: int) -> llama.Model:
    mx.random.seed(seed)
    model = llama.Model(llama.ModelArgs.from_dict(TINY_CONFIG))
    mx.eval(model.parameters())
    return model


def _write_model(folder: Path, seed: int) -> None:
    folder.mkdir()
    weights = dict(tree_flatten(_build(seed).parameters()))
    path = str(folder / "model.safetensors")
    mx.save_safetensors(path, weights, metadata={"format": "mlx"})  # pyright: ignore[reportArgumentType] - arrays all
    (folder / "config.json").write_text(json.dumps(TINY_CONFIG))
    write_tiny_tokenizer(folder)


def _write_adapter(folder: Path, name: str, seed: int) -> None:
    model = _build(0)
    keys = ("self_attn.q_proj", "mlp.up_proj")
    apply_dora(model, DoRAConfig(rank=4, scale=2.0, keys=keys, num_layers=-1))
    mx.random.seed(seed)
    for module in model.modules():
        if isinstance(module, DoRALinear):
            module.lora_b = 0.1 * mx.random.normal(module.lora_b.shape)
    save_adapter(model, folder / name, base_model=str(folder / "m0"))
