"""The small valid inputs that the fuzzer damages, made once by the real commands."""

import json
import os
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_dora.cli._group import group
from tests.conftest import TINY_CONFIG, write_tiny_tokenizer

CONFIG = {
    **TINY_CONFIG,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
RANK = ["--num-layers", "1", "--rank", "2"]
TRAINING = [
    "--model", "m0", "--data", "data", "--batch-size", "2", *RANK, "--mask-prompt",
    "--learning-rate", "1e-2", "--save-every", "2", "--steps-per-report", "1",
    "--steps-per-eval", "2", "--val-batches", "1", "--seed", "1",
]  # fmt: skip
MERGEKIT = """\
merge_method: ties
base_model: m0
models:
  - model: m1
    parameters: {weight: 0.5, density: 0.5}
  - model: m2
    parameters: {weight: [0.1, 0.9], density: 0.5}
parameters: {normalize: true, lambda: 0.7}
dtype: float32
"""
TRAIN_YAML = """\
model: m0
data: data
iters: 1
batch_size: 2
num_layers: 1
learning_rate: 1e-3
optimizer: adamw
optimizer_config: {adamw: {weight_decay: 0.1}}
lora_parameters: {rank: 2, scale: 20.0, dropout: 0.0, keys: [self_attn.q_proj]}
lr_schedule: {name: cosine_decay, arguments: [1e-3, 100, 1e-6], warmup: 10}
val_batches: 1
max_seq_length: 64
mask_prompt: true
seed: 3
rank_pattern: {q_proj: 1}
grad_accumulation_steps: 1
max_grad_norm: 1.0
"""


def run(*args: str) -> None:
    """Run a command of ours in this process; its errors come through."""
    group.main(list(args), prog_name="mlx_dora", standalone_mode=False)


def make_material(folder: Path) -> None:
    """Fill `folder` with models, data, adapters, Fisher information and YAML."""
    folder.mkdir(parents=True)
    for seed, name in enumerate(("m0", "m1", "m2")):
        _write_model(folder / name, seed)
    data = folder / "data"
    data.mkdir()
    for split, count in (("train", 6), ("valid", 2), ("test", 2)):
        rows = [
            {"prompt": f"What is {i}?", "completion": ("even", "odd")[i % 2]}
            for i in range(count)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (data / f"{split}.jsonl").write_text(text)
    (folder / "mergekit.yaml").write_text(MERGEKIT)
    (folder / "train.yaml").write_text(TRAIN_YAML)
    before = Path.cwd()
    os.chdir(folder)
    try:
        for name in ("a1", "a2"):
            run("train", *TRAINING, "--iters", "4", "--adapter-path", name)
        run("convert", "a1", "peft", "--to", "peft", "--model", "m0")
        for name, model in (("f0", "m0"), ("f1", "m1")):
            run("merge", "fisher", "--model", model, "--data", "data",
                "--save-path", name)  # fmt: skip
    finally:
        os.chdir(before)


def _write_model(folder: Path, seed: int) -> None:
    from mlx_lm.models import llama

    folder.mkdir()
    mx.random.seed(seed)
    model = llama.Model(llama.ModelArgs.from_dict(CONFIG))
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(
        str(folder / "model.safetensors"), weights, metadata={"format": "mlx"}
    )
    (folder / "config.json").write_text(json.dumps(CONFIG))
    write_tiny_tokenizer(folder)
