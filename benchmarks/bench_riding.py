"""Find up to how many tokens the norm's product should ride along with W0·x.

    python benchmarks/bench_riding.py [--rank 8] [--tokens 128] [--shape gate_proj]

Each case computes W0·x and the norms of a few layers in one graph, as a training step
does: from one product of [x; Aᵀ] with W0 ("riding") and from two ("apart"). "base" is
W0·x alone. The layers' weights take 32 MB together, so that each is read from memory,
not from the cache. The shapes are those of SmolLM2-135M, and Llama-3.2-1B's q_proj. The
last lines give, per shape and rank, the numbers of tokens at which riding was faster;
`riding._TOKENS_PER_ROW` is set from their ratio to the rows of W0.
"""

from collections.abc import Callable

import _harness as bench
import click
import mlx.core as mx

from mlx_dora.kernels import plain
from mlx_dora.matrix.weight import row_squares

SHAPES = {
    "k_proj": (192, 576),
    "q_proj": (576, 576),
    "gate_proj": (1536, 576),
    "down_proj": (576, 1536),
    "1B q_proj": (2048, 2048),
}
TOKENS = (16, 32, 64, 128, 256, 512, 1024)
SCALE = 2.0
WEIGHTS_BYTES = 1 << 25


def case(name: str, shape: tuple[int, int], tokens: int, rank: int) -> bench.Case:
    out, width = shape
    mx.random.seed(0)
    copies = max(1, WEIGHTS_BYTES // (4 * out * width))
    weights = [mx.random.normal(shape) for _ in range(copies)]
    squares = [row_squares(weight) for weight in weights]
    x = mx.random.normal((1, tokens, width))
    lora_a = mx.random.normal((width, rank)) * 0.02
    lora_b = mx.random.normal((rank, out)) * 0.02
    mx.eval(weights, squares, x, lora_a, lora_b)

    def compiled(one: Callable[..., bench.Arrays]) -> Callable[[], bench.Arrays]:
        both = mx.compile(
            lambda x, a, b, ws, qs: [
                one(x, w, a, b, q) for w, q in zip(ws, qs, strict=True)
            ]
        )
        return lambda: both(x, lora_a, lora_b, weights, squares)

    def apart(
        x: mx.array, w: mx.array, a: mx.array, b: mx.array, q: mx.array
    ) -> tuple[mx.array, mx.array]:
        return x @ w.T, plain.adapted_norm(w, a, b, SCALE, squared_base=q)

    def riding(
        x: mx.array, w: mx.array, a: mx.array, b: mx.array, q: mx.array
    ) -> tuple[mx.array, mx.array]:
        return plain.product_and_norm(x, w, a, b, SCALE, q)

    two = compiled(apart)
    return bench.Case(
        name=f"{name} {out} x {width}",
        dtype="float32",
        contenders=[
            bench.Contender(name="base", run=compiled(lambda x, w, *_: x @ w.T)),
            bench.Contender(name="apart", run=two),
            bench.Contender(name="riding", run=compiled(riding), expected=two),
        ],
        baseline="base",
        facts={"rank": rank, "tokens": tokens, "rows": out, "layers": copies},
    )


@click.command(help=__doc__.split("\n", 1)[0] if __doc__ else None)
@bench.options
@click.option(
    "--rank", "ranks", type=int, multiple=True, help="Ranks (default: 8 and 64)."
)
@click.option("--tokens", "counts", type=int, multiple=True, help="Numbers of tokens.")
@click.option("--shape", "names", type=click.Choice(list(SHAPES)), multiple=True)
def main(
    settings: bench.Settings,
    ranks: tuple[int, ...],
    counts: tuple[int, ...],
    names: tuple[str, ...],
) -> None:
    lines = []
    for rank in ranks or ((8,) if settings.smoke else (8, 64)):
        for name in names or (("k_proj",) if settings.smoke else tuple(SHAPES)):
            gains = []
            for tokens in counts or ((16,) if settings.smoke else TOKENS):
                done = bench.measure(case(name, SHAPES[name], tokens, rank), settings)
                bench.report(done)
                times = done.timings
                gain = 1 - times["riding"].p20_ms / times["apart"].p20_ms
                gains.append(f"{tokens}: {100 * gain:+.1f} %")
            lines.append(f"rank {rank}, {name}: {', '.join(gains)}")
    click.echo("Time that riding saves of both products, by tokens:", err=True)
    click.echo("\n".join(lines), err=True)


if __name__ == "__main__":
    main()
