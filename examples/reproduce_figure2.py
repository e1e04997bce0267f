"""Repeat figure 2 of DoRA on a small model: how ΔM and ΔD are related, by method.

    python examples/reproduce_figure2.py --model demo --output figure2

The script trains the same rows for the same steps with full fine-tuning, LoRA and DoRA,
three seeds each. At several steps it records ΔM and ΔD (arXiv:2402.09353, section 3.2)
of every matrix. It writes `results.jsonl`, and `figure2.md` with the correlations. If
you start it again with the same output folder, it computes only what is missing.
`--model demo` is the model of `mlx_dora.demo`. Without --model, a tiny random model
shows that the script runs.
"""

from mlx_dora import DoRAConfig, load  # isort: skip - loads OpenBLAS, so before mlx

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_dora.adapters.surgery import adapter_layers, base_of
from mlx_dora.demo.data import demo_rows
from mlx_dora.demo.model import demo_model
from mlx_dora.matrix import (
    Adapted,
    LowRank,
    RowGeometry,
    pair_geometry,
    row_geometry,
)
from mlx_dora.train import StepReport, TrainConfig, finetune

METHODS = ("full", "lora", "dora")
RATES = {"full": 5e-5, "lora": 5e-4, "dora": 5e-4}
RANK, SCALE = 8, 2.0


def tiny_model() -> tuple[nn.Module, list[list[int]]]:
    from mlx_lm.models import llama

    mx.random.seed(0)
    arguments = llama.ModelArgs(
        model_type="llama",
        hidden_size=32,
        num_hidden_layers=4,
        intermediate_size=64,
        num_attention_heads=4,
        rms_norm_eps=1e-5,
        vocab_size=64,
    )
    rows = [[(start * 7 + step * 3) % 64 for step in range(16)] for start in range(64)]
    return llama.Model(arguments), rows


def real_model(name: str, tokens: int) -> tuple[nn.Module, list[list[int]]]:
    model, tokenizer = load(demo_model() if name == "demo" else name)
    stream: list[int] = []
    for row in demo_rows()["train"]:
        stream += tokenizer.encode(f"{row.question}\n{row.answer}\n\n")
    ends = range(tokens, len(stream), tokens)
    return model, [stream[end - tokens : end] for end in ends]


def geometry(model: nn.Module, before: dict[str, mx.array]) -> dict[str, RowGeometry]:
    """Measure every adapted matrix (in full fine-tuning, every trained matrix)."""
    found = {}
    for path, layer in adapter_layers(model):
        base = base_of(layer)["weight"]
        update = LowRank(lora_a=layer.lora_a, lora_b=layer.lora_b, scale=layer.scale)
        found[path] = row_geometry(base, Adapted(update=update, m=layer.get("m")))
    if not found:
        for name, value in tree_flatten(model.trainable_parameters()):
            if isinstance(value, mx.array) and value.ndim == 2:
                path = name.removesuffix(".weight")
                found[path] = pair_geometry(before[name], value)
    return found


def run(arguments: argparse.Namespace, method: str, seed: int) -> list[dict[str, Any]]:
    if arguments.model is None:
        model, rows = tiny_model()
    else:
        model, rows = real_model(arguments.model, arguments.tokens)
    before: dict[str, mx.array] = {
        name: value
        for name, value in tree_flatten(model.parameters())
        if isinstance(value, mx.array)
    }
    records = []

    def note(report: StepReport) -> None:
        if report.train_loss is None:
            return
        matrices = [
            [
                path,
                rows_moved.mean_delta_m,
                rows_moved.mean_delta_m / float(rows_moved.base_norm.mean()),
                rows_moved.mean_delta_d,
            ]
            for path, rows_moved in geometry(model, before).items()
        ]
        record = {"method": method, "seed": seed, "step": report.step}
        records.append({**record, "loss": report.train_loss, "matrices": matrices})

    with tempfile.TemporaryDirectory() as folder:
        finetune(
            model,
            None,
            rows,
            None,
            train=TrainConfig(
                fine_tune_type=method,  # pyright: ignore[reportArgumentType]
                seed=seed,
                iters=arguments.steps,
                batch_size=arguments.batch,
                learning_rate=RATES[method],
                max_seq_length=arguments.tokens,
                steps_per_report=arguments.every,
                save_every=arguments.steps,
            ),
            dora=DoRAConfig(rank=RANK, scale=SCALE, num_layers=-1),
            adapter_path=Path(folder) / "run",
            callback=note,
        )
    return records


def summary(records: list[dict[str, Any]]) -> str:
    """Format all correlations as Markdown tables."""
    from mlx_dora.analyze.statistics import correlate, without_trend

    modules = sorted({row[0].split(".")[-1] for r in records for row in r["matrices"]})
    steps = sorted({record["step"] for record in records})
    lines = []
    for module in modules:
        lines += [
            f"\n### {module}\n",
            "| method | all checkpoints | last | last, without the trend over depth |",
            "| --- | --- | --- | --- |",
        ]
        for method in METHODS:
            points = []  # (seed, step, layer, ΔM, ΔD)
            for r in (r for r in records if r["method"] == method):
                chosen = [x for x in r["matrices"] if x[0].split(".")[-1] == module]
                points += [
                    (r["seed"], r["step"], depth, row[1], row[3])
                    for depth, row in enumerate(chosen)
                ]
            if not points:
                continue
            table = np.array(points)
            last = table[table[:, 1] == steps[-1]]
            flat = last.copy()
            for seed in np.unique(flat[:, 0]):
                own = flat[:, 0] == seed
                for column in (3, 4):
                    flat[own, column] = without_trend(flat[own, column])
            cells = []
            for part in (table, last, flat):
                fit = correlate(part[:, 3], part[:, 4], groups=part[:, 2])
                low, high = fit.interval
                cells.append(f"{fit.pearson:+.2f} [{low:+.2f}, {high:+.2f}]")
            lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a folder, a Hub id, or demo (default: tiny)")
    parser.add_argument("--output", type=Path, help="folder for the results")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--every", type=int, default=10, help="steps per checkpoint")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=32, help="tokens per row")
    arguments = parser.parse_args()
    output: Path = arguments.output or Path(tempfile.mkdtemp())
    output.mkdir(parents=True, exist_ok=True)
    settings = json.dumps(
        {k: v for k, v in vars(arguments).items() if k not in ("output", "seeds")}
    )
    results = output / "results.jsonl"
    records: list[dict[str, Any]] = []
    if results.exists():
        first, *rest = results.read_text().splitlines()
        if first != settings:
            raise SystemExit(f"{results} was made with other settings: {first}")
        records = [json.loads(line) for line in rest]
    else:
        results.write_text(settings + "\n")
    done = {(record["method"], record["seed"]) for record in records}
    for seed in range(arguments.seeds):
        for method in METHODS:
            if (method, seed) in done:
                continue
            start = time.perf_counter()
            added = run(arguments, method, seed)
            records += added
            with results.open("a") as file:  # all lines of a run together
                file.write("".join(json.dumps(record) + "\n" for record in added))
            seconds = time.perf_counter() - start
            print(
                f"{method} seed {seed}: loss {added[-1]['loss']:.3f}, {seconds:.0f} s"
            )
    text = summary(records)
    (output / "figure2.md").write_text(text)
    print(text)
    if arguments.output is None:
        shutil.rmtree(output)


if __name__ == "__main__":
    main()
