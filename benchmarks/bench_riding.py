"""Time training steps with the norm's product riding along with W0·x, and apart.

    OPENBLAS_NUM_THREADS=1 python benchmarks/bench_riding.py --clock cpu --runs 10

The limit `_TOKENS_PER_ROW` of `mlx_dora.matrix.riding` comes from this comparison: a
step of mlx-lm's LoRA; of ours with W0·A apart from W0·x in every layer, riding in every
layer, and riding up to the limit ("ours"). With `--grad-checkpoint`, the blocks are
recomputed: by mlx-lm for LoRA, and as in our training for ours.

The model has six blocks of SmolLM2-135M's shape, every linear layer adapted, random
weights, and a head of a fifth of the size, so that it takes a fifth of the time of the
whole model. A single layer would mislead: its weight stays in the cache, and a second
product with it costs less than in a step.
"""

from collections.abc import Callable
from typing import Any

import _harness as bench
import bench_model
import click
import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import llama
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlx_dora.adapters.config import DoRAConfig
from mlx_dora.adapters.surgery import adapter_layers, apply_dora
from mlx_dora.layers.linear import rides

SCALE = 2.0
DECISIONS: dict[str, Callable[[Any, mx.array], bool]] = {
    "apart": bench.never,
    "riding": lambda base, x: True,
    "ours": rides,
}


def blocks(smoke: bool) -> nn.Module:
    if smoke:
        return bench_model.tiny_model()
    mx.random.seed(0)
    return llama.Model(
        llama.ModelArgs(
            model_type="llama",
            hidden_size=576,
            num_hidden_layers=6,
            intermediate_size=1536,
            num_attention_heads=9,
            num_key_value_heads=3,
            rms_norm_eps=1e-5,
            vocab_size=49152 // 5,
            tie_word_embeddings=True,
        )
    )


def contenders(rank: int, smoke: bool) -> dict[str, Any]:
    """Make LoRA and DoRA over the same weights, with the same random factors."""
    lora, dora = blocks(smoke), blocks(smoke)
    settings: dict[str, Any] = {"rank": rank, "scale": SCALE}
    keys = bench_model.LINEARS
    for model in (lora, dora):
        model.freeze()
    linear_to_lora_layers(lora, -1, settings | {"dropout": 0.0, "keys": keys})
    apply_dora(dora, DoRAConfig(keys=keys, num_layers=-1, **settings))
    theirs = dict(lora.named_modules())
    for path, layer in adapter_layers(dora):
        layer.lora_b = mx.random.normal(layer.lora_b.shape) * 0.02
        theirs[path].update({"lora_a": layer.lora_a, "lora_b": layer.lora_b})
    mx.eval(lora.parameters(), dora.parameters())
    return {"mlx-lm LoRA": lora} | dict.fromkeys(DECISIONS, dora)


@click.command(help=__doc__.split("\n", 1)[0] if __doc__ else None)
@bench.options
@click.option("--rank", type=int, default=8, show_default=True)
@click.option(
    "--tokens",
    "counts",
    type=int,
    multiple=True,
    help="Tokens of a step, in 4 rows (default: 32, 128, 256 and 512).",
)
@click.option(
    "--grad-checkpoint", "checkpoint", is_flag=True, help="Recompute the blocks."
)
def main(
    settings: bench.Settings, rank: int, counts: tuple[int, ...], checkpoint: bool
) -> None:
    models = contenders(rank, settings.smoke)
    lora = models["mlx-lm LoRA"]
    vocabulary = lora["model"].embed_tokens.weight.shape[0]
    for tokens in counts or ((32,) if settings.smoke else (32, 128, 256, 512)):
        batch = (mx.arange(4 + tokens) * 7 % vocabulary).reshape(4, -1)
        runs = {
            name: bench_model.step(model, batch, checkpoint, theirs=model is lora)
            for name, model in models.items()
        }
        for name, decide in DECISIONS.items():
            runs[name] = bench.norms_where(decide)(runs[name])
        case = bench.Case(
            name="six blocks, step",
            dtype="float32",
            contenders=[
                bench.Contender(
                    name=name,
                    run=run,
                    expected=runs["apart"] if name in ("riding", "ours") else None,
                )
                for name, run in runs.items()
            ],
            baseline="mlx-lm LoRA",
            facts={"rank": rank, "tokens": tokens, "grad_checkpoint": checkpoint},
        )
        bench.report(bench.measure(case, settings))


if __name__ == "__main__":
    main()
