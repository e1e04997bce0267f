"""Time decoding of a batch whose rows use different adapters.

    python benchmarks/bench_gathered.py [--weight dense] [--rows 8]

The model is the demo's SmolLM2-135M; every linear layer of every block is adapted. The
adapters' ranks are 4, 8, 8, 16, 16, 32, 32 and 64, half of them DoRA and half LoRA. The
contenders decode the same batch on a KV cache of 16 tokens: without an adapter; with
one adapter, attached alone or in the gathered layers; and with eight. The logits of the
eight are compared with those of each adapter alone before anything is timed.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import _harness as bench
import click
import mlx.core as mx
from bench_model import LINEARS, plain_model
from mlx_lm.models.cache import make_prompt_cache, trim_prompt_cache

from mlx_dora.adapters.adapter import Adapter, take_adapter
from mlx_dora.adapters.attach import attach_adapter
from mlx_dora.adapters.config import DoRAConfig
from mlx_dora.adapters.gathered import GatheredAdapters
from mlx_dora.adapters.surgery import adapter_layers, apply_layers, remove_dora
from mlx_dora.layers.gathered import BASE

RANKS = (4, 8, 8, 16, 16, 32, 32, 64)
DECODE_STEPS, CACHED = 4, 16


def make_adapter(model: Any, rank: int, kind: Literal["dora", "lora"]) -> Adapter:
    """Return an adapter with random factors; the model is unchanged."""
    config = DoRAConfig(rank=rank, scale=2.0, keys=LINEARS, num_layers=-1)
    apply_layers(model, config, kind, any_rank=True)
    mx.random.seed(rank)
    for _, layer in adapter_layers(model):
        layer["lora_b"] = mx.random.normal(layer["lora_b"].shape) * 0.02
        if kind == "dora":
            layer["m"] = layer["m"] * (1 + 0.05 * mx.random.normal(layer["m"].shape))
    adapter = take_adapter(model)
    remove_dora(model)
    return adapter


def decode(
    model: Any, rows: Sequence[int], use: Callable[[], None]
) -> Callable[[], mx.array]:
    """Take a few steps of one token a row on a filled cache, then cut it back."""
    model.eval()
    vocabulary = model["model"].embed_tokens.weight.shape[0]
    cache = make_prompt_cache(model)
    use()
    numbers = mx.array(list(rows))[:, None]
    mx.eval(model((numbers * CACHED + mx.arange(CACHED)) % vocabulary, cache=cache))

    def run() -> mx.array:
        use()
        logits = []
        for token in range(DECODE_STEPS):
            logits.append(model(numbers + 5 * token, cache=cache))
            mx.eval(logits[-1])
        trim_prompt_cache(cache, DECODE_STEPS)
        return mx.concatenate(logits, axis=1)

    return run


def alone(model: Any, adapters: Sequence[Adapter], rows: Sequence[int]) -> mx.array:
    """Return the logits of each row in a batch of its own, with its own adapter."""
    logits = []
    for row in rows:
        attach_adapter(model, adapters[row % len(adapters)], check_base=False)
        logits.append(decode(model, [row], lambda: None)())
        remove_dora(model)
    return mx.concatenate(logits)


def case(quantized: bool, count: int, smoke: bool, folder: Path | None) -> bench.Case:
    def fresh() -> Any:
        model = plain_model(quantized, smoke, folder)
        model.update(base.parameters())
        return model

    rows = list(range(count))
    base = plain_model(quantized, smoke, folder)
    other = fresh()
    adapters = [
        make_adapter(other, rank, "lora" if number % 2 else "dora")
        for number, rank in enumerate(RANKS)
    ]
    small, large = fresh(), fresh()
    attach_adapter(small, adapters[4], check_base=False)
    attach_adapter(large, adapters[7], check_base=False)
    gathered = fresh()
    served = GatheredAdapters(gathered)
    keys = [served.add(adapter, check_base=False) for adapter in adapters]
    mixed = [keys[row % len(keys)] for row in rows]

    def gathering(rows_keys: list[int]) -> Callable[[], mx.array]:
        return decode(gathered, rows, lambda: served.use(rows_keys))

    runs = {
        "base": decode(base, rows, lambda: None),
        "rank 16 alone": decode(small, rows, lambda: None),
        "rank 64 alone": decode(large, rows, lambda: None),
        "no adapter, gathered": gathering([BASE] * count),
        "rank 16 gathered": gathering([keys[4]] * count),
        "rank 64 gathered": gathering([keys[7]] * count),
        "8 adapters": gathering(mixed),
    }
    expected = {"8 adapters": lambda: alone(other, adapters, rows)}
    return bench.Case(
        name=f"{'tiny' if smoke else 'SmolLM2-135M'} decode, several adapters",
        dtype="float32",
        contenders=[
            bench.Contender(
                name=name,
                run=run,
                expected=expected.get(name),
                bound=2e-3 if quantized else 1e-5,
            )
            for name, run in runs.items()
        ],
        baseline="rank 16 gathered",
        facts={
            "weight": "4-bit" if quantized else "dense",
            "rows": count,
            "ranks": " ".join(map(str, RANKS)),
            "repeats": DECODE_STEPS,
        },
    )


@click.command(help=__doc__.split("\n", 1)[0] if __doc__ else None)
@bench.options
@click.option("--weight", type=click.Choice(["dense", "4-bit"]))
@click.option("--rows", type=int, default=8, help="Rows of the batch.")
@click.option("--model", "folder", type=click.Path(path_type=Path, exists=True))
def main(
    settings: bench.Settings, weight: str | None, rows: int, folder: Path | None
) -> None:
    for quantized in (False, True):
        if weight and (weight == "4-bit") != quantized:
            continue
        bench.report(
            bench.measure(case(quantized, rows, settings.smoke, folder), settings)
        )


if __name__ == "__main__":
    main()
