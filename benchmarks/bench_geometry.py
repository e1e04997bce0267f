"""Time the live geometry of the reports relative to a training step, on SmolLM2-135M.

Every linear layer of every block is adapted at rank 8. By default, training reports
once in 10 steps.
"""

from pathlib import Path

import _harness as bench  # before mlx
import click
import mlx.core as mx
import mlx.nn as nn

from mlx_dora import DoRAConfig, apply_dora, load
from mlx_dora.demo.model import demo_model
from mlx_dora.evaluate.loss import loss_fn
from mlx_dora.train.geometry import measure_geometry

ROWS = 4
STEPS_PER_REPORT = 10


@click.command(help=__doc__.split("\n", 1)[0] if __doc__ else None)
@bench.options
@click.option("--model", "folder", type=click.Path(path_type=Path, exists=True))
@click.option("--length", default=128, help="Tokens per row.")
def main(settings: bench.Settings, folder: Path | None, length: int) -> None:
    length = 16 if settings.smoke else length
    model, _ = load(str(folder or demo_model()))
    apply_dora(model, DoRAConfig(rank=8, num_layers=1 if settings.smoke else -1))
    model.train()
    batch = (mx.arange(ROWS * (length + 1)) * 7 % 1000).reshape(ROWS, -1)
    marks = mx.array([[0, length + 1]] * ROWS)
    compute = nn.value_and_grad(model, loss_fn)
    state = [model.state]
    step = mx.compile(lambda *b: compute(model, *b), inputs=state, outputs=state)

    def geometry() -> mx.array:
        layers = measure_geometry(model).values()
        return mx.array([layer.delta_m for layer in layers])

    case = bench.Case(
        name="live geometry",
        dtype="float32",
        contenders=[
            bench.Contender(name="step", run=lambda: step(batch, marks)),
            bench.Contender(name="geometry", run=geometry),
        ],
        baseline="step",
        facts={"tokens": ROWS * length, "rank": 8},
    )
    measured = bench.measure(case, settings)
    bench.report(measured)
    share = measured.time_ratio("geometry")
    click.echo(
        f"  {share:.2%} of a step each time; {share / STEPS_PER_REPORT:.2%} at one "
        f"report in {STEPS_PER_REPORT} steps",
        err=True,
    )


if __name__ == "__main__":
    main()
