"""Compare predicted with measured peak memory of training, on the demo model.

Each setting is planned from the model's headers and then trained for two steps on rows
of the full length. Each setting prints a JSON line to stdout and a table row to stderr.
The exit code is 1 if a prediction is more than 15 % off (not with --smoke, whose model
is too small to plan). With --experts N, the model is a Mixtral with N experts, made
from the demo model's first eight blocks in float32. With --documents N, the rows are
packed with documents of N tokens. With --targets N, only each row's last N tokens are
targets, as with masked prompts; nothing is compiled, as in commands on a Linux CPU.
"""

import gc
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import _harness as bench  # before mlx
import click
import mlx.core as mx
from _machine import describe_machine
from _upcycle import upcycle

from mlx_dora import DoRAConfig, load
from mlx_dora.data.counts import RowSizes
from mlx_dora.demo.model import demo_model
from mlx_dora.train import TrainConfig, finetune, plan_memory

BOUND = 0.15
_BLOCKS = 8  # of a model with experts
# Tokens per row, rows, rank, blocks, gradient checkpointing, 4-bit base, kind.
SETTINGS: list[tuple[int, int, int, int, bool, bool, str]] = [
    (128, 4, 8, -1, False, False, "dora"),
    (128, 4, 8, -1, True, False, "dora"),
    (128, 4, 64, -1, False, False, "dora"),
    (256, 4, 8, 16, False, False, "dora"),
    (512, 1, 8, -1, False, False, "dora"),
    (512, 2, 8, -1, True, False, "dora"),
    (1024, 1, 8, 8, False, False, "dora"),
    (1024, 1, 8, 16, True, False, "dora"),
    (64, 2, 8, 4, False, False, "dora"),
    (128, 4, 8, -1, False, True, "dora"),
    (256, 2, 64, 16, True, True, "dora"),
    (128, 4, 8, -1, False, False, "lora"),
]
SMOKE = [(32, 2, 4, 1, False, False, "dora"), (32, 2, 4, 1, True, False, "lora")]


def compare(
    model: Path, setting: tuple[Any, ...], document: int | None, targets: int | None
) -> dict[str, Any]:
    """Plan and train one setting, with rows of one document or packed documents.

    Args:
        model: Folder of the model.
        setting: An entry of `SETTINGS`.
        document: Tokens of each document in packed rows; None for one document a row.
        targets: Number of each row's last tokens that are targets; None for all.
    """
    length, rows, rank, num_layers, checkpoint, _, kind = setting
    train = TrainConfig(
        model=str(model),
        iters=2,
        batch_size=rows,
        max_seq_length=length + 1,
        grad_checkpoint=checkpoint,
        fine_tune_type=kind,
        packing=document is not None,
    )
    dora = DoRAConfig(rank=rank, num_layers=num_layers)
    each = document or length + 1
    count = rows * ((length + 1) // each)
    first = 0 if targets is None else each - targets
    sizes = RowSizes(lengths=(each,) * count, targets=(each - first,) * count)
    plan = plan_memory(train, dora, lengths=sizes)
    base, _ = load(str(model))
    data = [([1 + i % 200 for i in range(each)], first)] * count
    with tempfile.TemporaryDirectory() as folder:
        report = finetune(
            base, None, data, None, train=train, dora=dora, adapter_path=f"{folder}/a"
        )
    measured = report.peak_memory_bytes
    return {
        "weights": plan.weights,
        "predicted": plan.peak,
        "measured": measured,
        "off": round(plan.peak / measured - 1, 4),
    }


@click.command(help=__doc__.split("\n", 1)[0] if __doc__ else None)
@bench.options
@click.option("--model", "folder", type=click.Path(path_type=Path, exists=True))
@click.option(
    "--only", type=int, multiple=True, help="Numbers of the settings to run, from 0."
)
@click.option(
    "--documents", "document", type=int, help="Tokens of each document in packed rows."
)
@click.option("--targets", type=int, help="Targets of each row, at its end.")
@click.option(
    "--experts", type=click.IntRange(min=2), help="Number of experts of a Mixtral."
)
def main(
    settings: bench.Settings,
    folder: Path | None,
    only: tuple[int, ...],
    document: int | None,
    targets: int | None,
    experts: int | None,
) -> None:
    if targets is not None:
        mx.disable_compile()
        os.environ["MLX_DISABLE_COMPILE"] = "1"  # read by the plan
    names = ("tokens", "rows", "rank", "num_layers", "grad_checkpoint", "4-bit", "type")
    worst = 0.0
    chosen = SMOKE if settings.smoke else SETTINGS
    if experts is not None:
        place = tempfile.TemporaryDirectory()  # until the end
        home = Path(place.name) / "mixtral"
        folder = upcycle(demo_model(), home, experts=experts, blocks=_BLOCKS)
        chosen = [row for row in chosen if row[3] <= _BLOCKS and not row[5]]
    for setting in [chosen[number] for number in only] or chosen:
        gc.collect()
        mx.clear_cache()
        model = folder or demo_model(dtype="q4" if setting[5] else "float32")
        result = compare(model, setting, document, targets)
        facts = dict(zip(names, setting, strict=True))
        worst = max(worst, abs(result["off"]))
        line = json.dumps(
            {
                "case": "plan",
                "document": document,
                "targets": targets,
                **facts,
                **result,
                **describe_machine(),
            }
        )
        click.echo(line)
        if settings.json_file:
            with settings.json_file.open("a") as file:
                file.write(line + "\n")
        shown = " ".join(f"{value!s:>6}" for value in setting)
        click.echo(
            f"{shown}  predicted {result['predicted'] / 1e6:6.0f} MB  measured "
            f"{result['measured'] / 1e6:6.0f} MB  {result['off']:+.1%}",
            err=True,
        )
    if worst > BOUND and not settings.smoke:
        raise click.ClickException(f"a prediction is {worst:.1%} off")


if __name__ == "__main__":
    main()
