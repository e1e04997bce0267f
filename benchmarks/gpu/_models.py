"""The model of the end-to-end measurements: random, the shape of Llama 3.2 1B."""

from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from _shapes import SHAPE

from mlx_dora import DoRAConfig, apply_dora

TINY = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
}
LINEARS = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)
SCALE = 2.0
KINDS = ("lora", "dora", "ours", "ours-plain")
"""mlx-lm's LoRA and DoRA, and ours with the measured choice and in plain MLX."""


class Bases:
    """One base model in memory, under several adapters.

    Args:
        is_tiny: Whether to take the small shape.
        bits: Bits of a quantized base; 0 for a dense base in bfloat16.
    """

    def __init__(self, is_tiny: bool, bits: int) -> None:
        self.shape = TINY if is_tiny else SHAPE
        self.bits = bits
        mx.random.seed(0)
        first = self._plain()
        mx.eval(first.parameters())
        self._shared = first.parameters()
        self._factors: dict[int, dict[str, dict[str, mx.array]]] = {}

    def _plain(self) -> nn.Module:
        from mlx_lm.models import llama

        facts = {
            "model_type": "llama",
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "tie_word_embeddings": True,
            "max_position_embeddings": 4096,
            **self.shape,
        }
        model = llama.Model(llama.ModelArgs.from_dict(facts))
        model.set_dtype(mx.bfloat16)
        if self.bits:
            nn.quantize(model, 64, self.bits)
        return model

    def adapted(self, kind: str, rank: int) -> nn.Module:
        """Return a model of a kind, whose factors are the same for all kinds."""
        from mlx_lm.tuner.utils import linear_to_lora_layers

        model = self._plain()
        model.update(self._shared)
        model.freeze()
        if kind.startswith("ours"):
            config = DoRAConfig(rank=rank, scale=SCALE, keys=LINEARS, num_layers=-1)
            apply_dora(model, config)
        else:
            settings = {
                "rank": rank, "scale": SCALE, "dropout": 0.0, "keys": list(LINEARS)
            }  # fmt: skip
            linear_to_lora_layers(model, -1, settings, use_dora=kind == "dora")
        for path, module in model.named_modules():
            if "lora_a" in module:
                module.update(cast(dict[str, Any], self._factors_of(path, module)))
        mx.eval(model.parameters())
        return model

    def _factors_of(self, path: str, module: nn.Module) -> dict[str, mx.array]:
        rank = module["lora_a"].shape[-1]
        known = self._factors.setdefault(rank, {})
        if path not in known:
            keys = mx.random.split(mx.random.key(len(known)), 2)
            shape = module["lora_a"].shape
            bound = shape[0] ** -0.5
            known[path] = {
                "lora_a": mx.random.uniform(-bound, bound, shape, key=keys[0]),
                "lora_b": 0.01 * mx.random.normal(module["lora_b"].shape, key=keys[1]),
            }
            mx.eval(known[path])
        return known[path]
