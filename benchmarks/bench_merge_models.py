"""Compare the time and peak memory of merging whole models with mergekit's.

    python benchmarks/bench_merge_models.py --peers PYTHON --model FOLDER [--runs 5]
    python benchmarks/bench_merge_models.py --smoke

PYTHON is an interpreter that has mergekit. The script makes two copies of the model and
moves their tensors at random. linear and slerp merge the model with the first copy,
karcher merges all three, and task_arithmetic and ties merge the copies relative to the
model. For each method, both programs read the same YAML file.

Every merge runs in a separate process, in turns. The seconds are those of the merge,
without imports and process start (``cpu_seconds``: of all threads), and the peak is the
process's resident set. Ours flushes its output to the disk in that time; mergekit does
not. The script compares the outputs first; ``error`` is the largest error of a tensor.
Methods that `--methods` names besides these are listed in `configs`; passthrough stacks
40 blocks of two models of 30.
The smoke run merges two tiny models without mergekit and compares with NumPy.
"""

import _harness as bench  # isort: skip - before mlx

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import click
import mlx.core as mx
import numpy as np

from mlx_dora.io.checkpoint import Checkpoint, ShardWriter

COMPAT = Path(__file__).parents[1] / "tests" / "compat"
PEER = COMPAT / "mergekit_peer.py"
OURS = """
import json, sys, time
sys.path.insert(0, sys.argv[3])
from peak import peak_bytes
from pathlib import Path
import yaml
from mlx_dora import openblas
openblas.preload()
from mlx_dora.merge.models.mergekit import read_mergekit
from mlx_dora.merge.models.merge import run_merge
started, cpu = time.perf_counter(), time.process_time()
run_merge(read_mergekit(yaml.safe_load(Path(sys.argv[1]).read_text())), sys.argv[2])
record = {
    "seconds": time.perf_counter() - started,
    "cpu_seconds": time.process_time() - cpu,
    "peak_bytes": peak_bytes(),
}
print(json.dumps(record))
"""
KEYS = ("seconds", "cpu_seconds", "peak_bytes")


def configs(models: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the YAML settings of each method."""
    first, second, third = models

    def entries(names: Sequence[str], **own: float) -> list[dict[str, Any]]:
        return [{"model": n, **({"parameters": own} if own else {})} for n in names]

    changes = {"base_model": first, "dtype": "float32"}
    return {
        "linear": {
            "merge_method": "linear",
            "models": entries([first, second], weight=0.5),
            "dtype": "float32",
        },
        "slerp": {
            "merge_method": "slerp",
            "models": entries([first, second]),
            "parameters": {"t": 0.4},
            **changes,
        },
        "karcher": {
            "merge_method": "karcher",
            "models": entries([first, second, third]),
            "dtype": "float32",
        },
        "task_arithmetic": {
            "merge_method": "task_arithmetic",
            "models": entries([second, third], weight=0.5),
            **changes,
        },
        "ties": {
            "merge_method": "ties",
            "models": entries([second, third], weight=0.5, density=0.2),
            **changes,
        },
        "multislerp": {
            "merge_method": "multislerp",
            "models": entries([first, second, third], weight=0.5),
            "dtype": "float32",
        },
        "breadcrumbs": {
            "merge_method": "breadcrumbs",
            "models": entries([second, third], weight=0.5, density=0.9),
            **changes,
        },
        "della": {  # at random: compare its times only
            "merge_method": "della",
            "models": entries([second, third], weight=0.5, density=0.5),
            **changes,
        },
        "sce": {
            "merge_method": "sce",
            "models": entries([second, third]),
            "parameters": {"select_topk": 0.5},
            **changes,
        },
        "nearswap": {
            "merge_method": "nearswap",
            "models": entries([second]),
            "parameters": {"t": 0.01},
            **changes,
        },
        "arcee_fusion": {
            "merge_method": "arcee_fusion",
            "models": entries([second]),
            **changes,
        },
        "passthrough": {
            "merge_method": "passthrough",
            "slices": [
                {"sources": [{"model": first, "layer_range": [0, 20]}]},
                {"sources": [{"model": second, "layer_range": [10, 30]}]},
            ],
            "dtype": "float32",
        },
    }


def perturb(source: Path, folder: Path, seed: int) -> str:
    """Write a model as if fine-tuned: move every tensor by a tenth of its spread."""
    folder.mkdir()
    for path in source.glob("*.json"):
        if "index" not in path.name:
            shutil.copyfile(path, folder / path.name)
    mx.random.seed(seed)
    checkpoint = Checkpoint(source)
    with ShardWriter(folder) as writer:
        for name in checkpoint.names:
            value = checkpoint.tensor(name)
            size = 0.1 * mx.sqrt(value.astype(mx.float32).var())
            noise = size * mx.random.normal(value.shape)
            writer.add(name, (value + noise).astype(value.dtype))
    return str(folder)


def run(command: list[str], peer: bool) -> dict[str, float]:
    hidden = ("PYTHONPATH", "LD_PRELOAD") if peer else ()
    environment = {k: v for k, v in os.environ.items() if k not in hidden}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise click.ClickException(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def compare(ours: Path, theirs: Path) -> float:
    merged, expected = Checkpoint(ours), Checkpoint(theirs)
    if merged.names != expected.names:
        raise click.ClickException("the outputs have different tensors")
    return max(
        bench.relative_rms(merged.tensor(name), expected.tensor(name))
        for name in merged.names
    )


def smoke() -> None:
    """Run only our side, on two tiny models, and compare with NumPy."""
    with tempfile.TemporaryDirectory() as folder:
        at = Path(folder)
        rows = []
        for seed in range(2):
            mx.random.seed(seed)
            value = mx.random.normal((24, 16))
            rows.append(np.array(value))
            model = at / str(seed)
            model.mkdir()
            mx.save_safetensors(
                str(model / "model.safetensors"), {"model.layers.0.a.weight": value}
            )
            (model / "config.json").write_text('{"model_type": "llama"}')
        models = [
            {"model": str(at / str(i)), "parameters": {"weight": 0.5}} for i in range(2)
        ]
        config = at / "linear.yaml"
        config.write_text(
            json.dumps({"models": models, "merge_method": "linear", "dtype": "float32"})
        )
        line = [sys.executable, "-c", OURS, str(config), str(at / "out"), str(COMPAT)]
        record = run(line, False)
        merged = Checkpoint(at / "out").tensor("model.layers.0.a.weight")
        error = bench.relative_rms(merged, mx.array((rows[0] + rows[1]) / 2))
        if not error < 1e-6:
            raise click.ClickException(f"the merge is off by {error:.1e}.")
        line = {"case": "smoke", "error": error, **record}
        click.echo(json.dumps({**line, **bench.describe_machine()}))


def time_method(config: Path, peers: str, runs: int) -> dict[str, Any]:
    """Merge by the same YAML in turns, and compare the outputs once."""
    records: dict[str, list[dict[str, float]]] = {"ours": [], "mergekit": []}
    error = None
    for _ in range(runs):
        with tempfile.TemporaryDirectory() as folder:
            at = Path(folder)
            commands = {
                "ours": [sys.executable, "-c", OURS],
                "mergekit": [peers, str(PEER)],
            }
            for name, command in commands.items():
                line = [*command, str(config), str(at / name), str(COMPAT)]
                records[name].append(run(line, peer=name == "mergekit"))
            if error is None:
                error = compare(at / "ours", at / "mergekit")
    figures = {
        f"{name}_{key}": median(record[key] for record in runs_of)
        for name, runs_of in records.items()
        for key in KEYS
    }
    ratios = {
        f"{key}_ratio": round(figures[f"ours_{key}"] / figures[f"mergekit_{key}"], 3)
        for key in KEYS
    }
    return {"case": config.stem, "error": error, **figures, **ratios, "runs": runs}


@click.command(help=__doc__)
@click.option("--peers", help="Python interpreter that has mergekit.")
@click.option(
    "--model", help="Model folder, merged with two copies that are moved a little."
)
@click.option("--methods", default="linear,slerp,karcher,task_arithmetic,ties")
@click.option("--runs", default=5, show_default=True)
@click.option(
    "--smoke", "is_smoke", is_flag=True, help="Tiny models, without mergekit."
)
def main(
    peers: str | None, model: str | None, methods: str, runs: int, is_smoke: bool
) -> None:
    if is_smoke:
        smoke()
        return
    if model is None or peers is None:
        raise click.UsageError("give --model and --peers, or --smoke.")
    with tempfile.TemporaryDirectory() as folder:
        at = Path(folder)
        tuned = [perturb(Path(model), at / f"tuned{seed}", seed) for seed in (1, 2)]
        for method, config in configs([model, *tuned]).items():
            if method in methods.split(","):
                path = at / f"{method}.yaml"
                path.write_text(json.dumps(config))
                line = time_method(path, peers, runs)
                click.echo(json.dumps({**line, **bench.describe_machine()}))


if __name__ == "__main__":
    main()
