"""Time a model: our DoRA, mlx-lm's DoRA and LoRA, and the plain base.

    python benchmarks/bench_model.py [--only decode] [--rank 8] [--weight dense]

The model is the demo's SmolLM2-135M with every linear layer of every block adapted. The
cases are: decoding with a KV cache of 64 tokens; prompts of 8, 32 and 128 tokens; and a
training step (forward pass, loss, gradients of the adapter) of 4 x 32 and 4 x 128
tokens, with and without gradient checkpointing: mlx-lm's for its own layers, ours for
ours. In a step, "norms apart" is ours with W0·A computed apart from W0·x. The
contenders share a single copy of the base's weights.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import _harness as bench
import click
import mlx.core as mx
import mlx.nn as nn
from mlx_lm import load
from mlx_lm.models import llama
from mlx_lm.models.cache import make_prompt_cache, trim_prompt_cache
from mlx_lm.tuner.trainer import default_loss, grad_checkpoint
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlx_dora.adapters.config import DoRAConfig
from mlx_dora.adapters.surgery import adapter_layers, apply_dora
from mlx_dora.demo.model import demo_model
from mlx_dora.train.recompute import recomputed_blocks

SCALE = 2.0
DECODE_STEPS = 4
CACHED = 64
APART = "norms apart"
OURS = ("ours", APART)
LINEARS = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)


def tiny_model() -> nn.Module:
    mx.random.seed(0)
    return llama.Model(
        llama.ModelArgs(
            model_type="llama",
            hidden_size=64,
            num_hidden_layers=2,
            intermediate_size=96,
            num_attention_heads=4,
            rms_norm_eps=1e-5,
            vocab_size=128,
        )
    )


def plain_model(quantized: bool, smoke: bool, folder: Path | None) -> Any:
    if smoke:
        model = tiny_model()
        if quantized:
            nn.quantize(model, 32, 4)
        return model
    path = folder or demo_model(dtype="q4" if quantized else "float32")
    return load(str(path))[0]


def contenders(
    rank: int, quantized: bool, smoke: bool, folder: Path | None
) -> dict[str, Any]:
    """Make the four models, with the same trained factors and shared base weights."""
    models = {
        name: plain_model(quantized, smoke, folder)
        for name in ("base", "mlx-lm LoRA", "mlx-lm DoRA", "ours", APART)
    }
    shared = models["base"].parameters()
    settings = {"rank": rank, "scale": SCALE, "dropout": 0.0, "keys": LINEARS}
    for name, model in models.items():
        model.update(shared)
        model.freeze()
        if name in OURS:
            config = DoRAConfig(rank=rank, scale=SCALE, keys=LINEARS, num_layers=-1)
            apply_dora(model, config)
        elif name != "base":
            linear_to_lora_layers(model, -1, settings, use_dora=name == "mlx-lm DoRA")
    mx.random.seed(1)
    for path, layer in adapter_layers(models["ours"]):
        factors = {
            "lora_a": layer.lora_a,
            "lora_b": mx.random.normal(layer.lora_b.shape) * 0.02,
        }
        for name in ("mlx-lm LoRA", "mlx-lm DoRA", "ours", APART):
            dict(models[name].named_modules())[path].update(factors)
    mx.eval([model.parameters() for model in models.values()])
    return models


def decode(model: Any, vocabulary: int) -> Callable[[], mx.array]:
    """Take a few single-token steps on a filled cache, then cut the cache back."""
    model.eval()
    cache = make_prompt_cache(model)
    mx.eval(model(mx.arange(CACHED)[None] % vocabulary, cache=cache))

    def run() -> mx.array:
        logits = mx.array(0)
        for token in range(DECODE_STEPS):
            logits = model(mx.array([[token + 5]]), cache=cache)
            mx.eval(logits)
        trim_prompt_cache(cache, DECODE_STEPS)
        return logits

    return run


def prompt(model: Any, tokens: mx.array) -> Callable[[], mx.array]:
    model.eval()
    return lambda: model(tokens)


def step(
    model: Any, batch: mx.array, checkpoint: bool, *, theirs: bool
) -> Callable[[], list]:
    """Compute loss and gradients as a trainer does, compiled.

    Gradient checkpointing is mlx-lm's if `theirs`, otherwise that of our training.
    """
    lengths = mx.array([[0, batch.shape[1]]] * batch.shape[0])
    compute = nn.value_and_grad(model, default_loss)
    compiled = mx.compile(
        lambda *arguments: compute(model, *arguments),
        inputs=[model.state],
        outputs=[model.state],
    )
    model.train()  # once, as in training: it looks at every module

    def recomputing() -> AbstractContextManager[None]:
        if theirs and checkpoint:
            return their_checkpoint(model.layers[0])
        return recomputed_blocks(model, checkpoint)

    def run() -> list:
        with recomputing():
            (loss, _), gradients = compiled(batch, lengths)
        return [loss, gradients]

    return run


@contextmanager
def their_checkpoint(block: Any) -> Iterator[None]:
    """Checkpoint blocks of this class as mlx-lm's trainer does, which never stops."""
    kind = type(block)
    plain = kind.__call__
    grad_checkpoint(block)
    try:
        yield
    finally:
        kind.__call__ = plain


def cases(
    kind: str,
    rank: int,
    quantized: bool,
    smoke: bool,
    folder: Path | None,
    lengths: tuple[int, ...],
) -> list[bench.Case]:
    models = contenders(rank, quantized, smoke, folder)
    vocabulary = models["base"]["model"].embed_tokens.weight.shape[0]
    runners: list[tuple[str, dict, Callable[..., Callable]]] = []
    if kind == "decode":
        facts = {"tokens": 1, "repeats": DECODE_STEPS}
        runners.append(("decode", facts, lambda model, _: decode(model, vocabulary)))
    elif kind == "prompt":
        for count in (8,) if smoke else (8, 32, 128):
            tokens = mx.arange(count)[None] * 7 % vocabulary
            runners.append(
                ("prompt", {"tokens": count}, lambda m, _, t=tokens: prompt(m, t))
            )
    else:
        for length in (8,) if smoke else (lengths or (32, 128)):
            batch = (mx.arange(4 * (length + 1)) * 7 % vocabulary).reshape(4, -1)
            for checkpoint in (False, True):
                facts = {"tokens": 4 * length, "grad_checkpoint": checkpoint}

                def runner(
                    model: nn.Module,
                    theirs: bool,
                    batch: mx.array = batch,
                    checkpoint: bool = checkpoint,
                ) -> Callable[[], list]:
                    return step(model, batch, checkpoint, theirs=theirs)

                runners.append(("step", facts, runner))
    made = []
    for name, facts, make in runners:
        runs = {
            label: make(model, label not in OURS) for label, model in models.items()
        }
        if kind == "step":
            del runs["base"]  # nothing to train in the base
            runs[APART] = bench.norms_where(bench.never)(runs[APART])
        else:
            del runs[APART]
        made.append(
            bench.Case(
                name=f"SmolLM2-135M {name}" if not smoke else f"tiny {name}",
                dtype="float32",
                contenders=[
                    bench.Contender(
                        name=label,
                        run=run,
                        expected=runs["mlx-lm DoRA"] if label in OURS else None,
                        bound=1e-3,
                    )
                    for label, run in runs.items()
                ],
                baseline="mlx-lm LoRA",
                facts={
                    "weight": "4-bit" if quantized else "dense",
                    "rank": rank,
                    **facts,
                },
            )
        )
    return made


@click.command(help=__doc__.split("\n", 1)[0] if __doc__ else None)
@bench.options
@click.option("--only", type=click.Choice(["decode", "prompt", "step"]))
@click.option(
    "--rank", "ranks", type=int, multiple=True, help="Ranks (default: 8 and 64)."
)
@click.option("--weight", type=click.Choice(["dense", "4-bit"]))
@click.option(
    "--length",
    "lengths",
    type=int,
    multiple=True,
    help="Tokens per row (default: 32 and 128).",
)
@click.option("--model", "folder", type=click.Path(path_type=Path, exists=True))
def main(
    settings: bench.Settings,
    only: str | None,
    ranks: tuple[int, ...],
    weight: str | None,
    lengths: tuple[int, ...],
    folder: Path | None,
) -> None:
    smoke = settings.smoke
    for kind in [only] if only else ["decode", "prompt", "step"]:
        for quantized in (False, True):
            if weight and (weight == "4-bit") != quantized:
                continue
            for rank in ranks or ((4,) if smoke else (8, 64)):
                for case in cases(kind, rank, quantized, smoke, folder, lengths):
                    bench.report(bench.measure(case, settings))


if __name__ == "__main__":
    main()
