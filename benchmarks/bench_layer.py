"""Time a layer: our DoRA, mlx-lm's DoRA, mlx-lm's LoRA, and the plain base.

    python benchmarks/bench_layer.py [--only decode] [--rank 8] [--smoke]

The cases are the forward pass of 1, 8, 32 and 128 tokens in eval mode, and a training
step (the forward pass and the gradients of the adapter and the input) of 32, 128 and
512 tokens, on a dense and on a 4-bit base, at ranks 8 and 64. In a step, "norms apart"
is ours with W0·A computed apart from W0·x. The shapes are those of SmolLM2-135M's
gate_proj, SmolLM2-1.7B's q_proj and Llama-3.2-1B's down_proj.
"""

from collections.abc import Callable
from typing import Any

import _harness as bench
import click
import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tuner.dora import DoRALinear as TheirDoRA
from mlx_lm.tuner.lora import LoRALinear

from mlx_dora.layers import DoRALinear

SHAPES = {"gate_proj": (576, 1536), "q_proj": (2048, 2048), "down_proj": (8192, 2048)}
SMOKE = {"tiny": (64, 64)}
SCALE = 2.0
APART = "norms apart"
REPEATS = {
    1: 20,
    8: 5,
    32: 2,
}  # calls per timed run; a single short call would drown in noise


def layers(
    shape: tuple[int, int], rank: int, quantized: bool, dtype: mx.Dtype
) -> dict[str, nn.Module]:
    """Make the contenders on the same base, with the same trained factors."""
    mx.random.seed(0)
    linear = nn.Linear(*shape, bias=False)
    linear.set_dtype(dtype)
    base: Any = linear.to_quantized(64, 4) if quantized else linear
    made: dict[str, nn.Module] = {
        "base": base,
        "mlx-lm LoRA": LoRALinear.from_base(base, r=rank, scale=SCALE),
        "mlx-lm DoRA": TheirDoRA.from_base(base, r=rank, scale=SCALE),
        "ours": DoRALinear.from_base(base, r=rank, scale=SCALE),
        APART: DoRALinear.from_base(base, r=rank, scale=SCALE),
    }
    first = made["ours"]
    lora_b = mx.random.normal(first["lora_b"].shape) * 0.02
    for name, layer in made.items():
        if name == "base":
            layer.freeze()
            continue
        layer.update({"lora_a": first["lora_a"], "lora_b": lora_b})
        layer.freeze()
        layer.unfreeze(keys=["lora_a", "lora_b", "m"], recurse=False)
    mx.eval([layer.parameters() for layer in made.values()])
    return made


def forward(layer: nn.Module, x: mx.array, repeats: int) -> Callable[[], mx.array]:
    layer.eval()

    def run() -> mx.array:
        y = layer(x)
        for _ in range(repeats - 1):
            mx.eval(y)
            y = layer(x)
        return y

    return run


def training(layer: nn.Module, x: mx.array, dy: mx.array) -> Callable[[], list]:
    layer.train()

    def loss(params: dict, x: mx.array) -> mx.array:
        layer.update(params)
        return (layer(x) * dy).sum()

    step = mx.compile(mx.value_and_grad(loss, argnums=(0, 1)))
    params = layer.trainable_parameters()

    def run() -> list:
        value, gradients = step(params, x)
        layer.update(params)
        return [value, gradients]

    return run


def case(
    name: str,
    shape: tuple[int, int],
    tokens: int,
    rank: int,
    quantized: bool,
    dtype: mx.Dtype,
    train: bool,
) -> bench.Case:
    made = layers(shape, rank, quantized, dtype)
    x = mx.random.normal((1, tokens, shape[0])).astype(dtype)
    dy = mx.random.normal((1, tokens, shape[1])).astype(dtype)
    mx.eval(x, dy)
    repeats = 1 if train else REPEATS.get(tokens, 1)

    def runner(layer: nn.Module) -> Callable[[], bench.Arrays]:
        return training(layer, x, dy) if train else forward(layer, x, repeats)

    runs = {label: runner(layer) for label, layer in made.items()}
    apart = runs.pop(APART)
    if train:
        runs[APART] = bench.norms_where(bench.never)(apart)

    # An independent reference: mlx-lm's DoRA divides by the norm of the dense weight.
    reference = runs["mlx-lm DoRA"]
    return bench.Case(
        name=f"{name} {'step' if train else 'forward'}",
        dtype=str(dtype).removeprefix("mlx.core."),
        contenders=[
            bench.Contender(
                name=label,
                run=run,
                expected=reference if label in ("ours", APART) else None,
                bound=1e-4 if dtype == mx.float32 else 2e-2,
            )
            for label, run in runs.items()
        ],
        baseline="mlx-lm LoRA",
        facts={
            "weight": "4-bit" if quantized else "dense",
            "tokens": tokens,
            "rank": rank,
            "repeats": repeats,
        },
    )


@click.command(help=__doc__.split("\n", 1)[0] if __doc__ else None)
@bench.options
@click.option("--only", type=click.Choice(["decode", "batch", "step"]))
@click.option(
    "--rank", "ranks", type=int, multiple=True, help="Ranks (default: 8 and 64)."
)
@click.option("--weight", type=click.Choice(["dense", "4-bit"]))
@click.option("--dtype", default="float32", show_default=True)
def main(
    settings: bench.Settings,
    only: str | None,
    ranks: tuple[int, ...],
    weight: str | None,
    dtype: str,
) -> None:
    kinds = {"decode": (1,), "batch": (8, 32, 128), "step": (32, 128, 512)}
    if settings.smoke:
        kinds = {"decode": (1,), "batch": (8,), "step": (8,)}
    for kind in [only] if only else kinds:
        for name, shape in (SMOKE if settings.smoke else SHAPES).items():
            for quantized in (False, True):
                if weight and (weight == "4-bit") != quantized:
                    continue
                for rank in ranks or ((8,) if settings.smoke else (8, 64)):
                    for tokens in kinds[kind]:
                        job = case(
                            name,
                            shape,
                            tokens,
                            rank,
                            quantized,
                            getattr(mx, dtype),
                            kind == "step",
                        )
                        bench.report(bench.measure(job, settings))


if __name__ == "__main__":
    main()
