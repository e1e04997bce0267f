"""Use our layers in a training script written for mlx-lm.

    python examples/train_with_mlx_lm.py [--model PATH_OR_ID] [--iters 30]

The script uses mlx-lm's own loader, `linear_to_lora_layers` and trainer. Only the
`with` line is ours. Without --model it makes a tiny random model.
"""

from mlx_dora import DoRALinear, use_in_mlx_lm  # isort: skip - loads OpenBLAS, so before mlx

import argparse
import json
import tempfile
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten
from mlx_lm import load
from mlx_lm.models import llama
from mlx_lm.tuner.datasets import CacheDataset
from mlx_lm.tuner.trainer import TrainingArgs, train
from mlx_lm.tuner.utils import linear_to_lora_layers


class Rows:
    """Token rows in the form that mlx-lm's trainer expects: (tokens, first target)."""

    def __init__(self, rows: list[list[int]]) -> None:
        self.rows = rows

    def __getitem__(self, index: int) -> list[int]:
        return self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)

    def process(self, row: list[int]) -> tuple[list[int], int]:
        """Return the tokens and the index of the first token in the loss."""
        return row, 0


def tiny_model() -> nn.Module:
    mx.random.seed(0)
    return llama.Model(
        llama.ModelArgs(
            model_type="llama",
            hidden_size=32,
            num_hidden_layers=2,
            intermediate_size=64,
            num_attention_heads=4,
            rms_norm_eps=1e-5,
            vocab_size=64,
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a folder or a Hub id (default: a tiny model)")
    parser.add_argument("--iters", type=int, default=30)
    arguments = parser.parse_args()

    if arguments.model:
        model, tokenizer = load(arguments.model)[:2]
        texts = ["The cat sat on the mat.", "A dog lay on the rug."] * 8
        rows = [tokenizer.encode(text) for text in texts]
    else:
        model = tiny_model()
        rows = [[(start + step * 3) % 64 for step in range(16)] for start in range(16)]
    data = CacheDataset(Rows(rows))

    with use_in_mlx_lm():
        model.freeze()
        lora = {"rank": 8, "scale": 10.0, "dropout": 0.0}
        linear_to_lora_layers(model, 2, lora, use_dora=True)
    assert any(isinstance(module, DoRALinear) for module in model.modules())

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        (path / "adapter_config.json").write_text(
            json.dumps(
                {"fine_tune_type": "dora", "num_layers": 2, "lora_parameters": lora}
            )
        )
        train(
            model=model,
            optimizer=optim.Adam(learning_rate=1e-3),
            train_dataset=data,
            args=TrainingArgs(
                iters=arguments.iters,
                batch_size=4,
                adapter_file=str(path / "adapters.safetensors"),
            ),
        )
        saved = mx.load(str(path / "adapters.safetensors"))
    trained = dict(tree_flatten(model.trainable_parameters()))
    assert isinstance(saved, dict)
    assert saved.keys() == trained.keys()
    print(f"{len(saved)} adapter tensors written in mlx-lm's format")


if __name__ == "__main__":
    main()
