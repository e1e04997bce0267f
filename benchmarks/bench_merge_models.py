"""Merging whole models: time and peak memory against mergekit's, on one YAML.

    python benchmarks/bench_merge_models.py --peers PYTHON CONFIG.yaml [--runs 3]
    python benchmarks/bench_merge_models.py --smoke

CONFIG is mergekit's YAML; PYTHON an interpreter with mergekit. Each merges in a process
of its own, in turns; the seconds are those of the merge, imports and process start
apart, and the peak is the process's resident set. Outputs are compared first. The smoke
run merges two tiny models without mergekit and compares with NumPy.
"""

import _harness as bench  # isort: skip - before mlx

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import click
import mlx.core as mx
import numpy as np

from mlx_dora.io.checkpoint import Checkpoint

PEER = Path(__file__).parents[1] / "tests" / "compat" / "mergekit_peer.py"
OURS = """
import json, resource, sys, time
from pathlib import Path
import yaml
from mlx_dora import openblas
openblas.preload()
from mlx_dora.merge.mergekit import read_mergekit
from mlx_dora.merge.models import run_merge
started = time.perf_counter()
run_merge(read_mergekit(yaml.safe_load(Path(sys.argv[1]).read_text())), sys.argv[2])
seconds = time.perf_counter() - started
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"seconds": seconds, "peak_bytes": peak}))
"""


def run(command: list[str], peer: bool) -> dict[str, float]:
    hidden = ("PYTHONPATH", "LD_PRELOAD") if peer else ()
    environment = {k: v for k, v in os.environ.items() if k not in hidden}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise click.ClickException(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def compare(ours: Path, theirs: Path) -> float:
    found, expected = Checkpoint(ours), Checkpoint(theirs)
    if found.names != expected.names:
        raise click.ClickException("the outputs have different tensors")
    return max(
        bench.relative_rms(found.tensor(name), expected.tensor(name))
        for name in found.names
    )


def smoke() -> None:
    """Our side alone, on two tiny models, against NumPy."""
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
        told = run([sys.executable, "-c", OURS, str(config), str(at / "out")], False)
        found = Checkpoint(at / "out").tensor("model.layers.0.a.weight")
        error = bench.relative_rms(found, mx.array((rows[0] + rows[1]) / 2))
        if not error < 1e-6:
            raise click.ClickException(f"the merge is off by {error:.1e}.")
        line = {"case": "smoke", "error": error, **told}
        click.echo(json.dumps({**line, **bench.describe_machine()}))


@click.command(help=__doc__)
@click.argument("config", type=click.Path(exists=True, path_type=Path), required=False)
@click.option("--peers", help="An interpreter with mergekit.")
@click.option("--runs", default=3, show_default=True)
@click.option("--smoke", "is_smoke", is_flag=True, help="Tiny, without mergekit.")
def main(config: Path | None, peers: str | None, runs: int, is_smoke: bool) -> None:
    if is_smoke:
        smoke()
        return
    if config is None or peers is None:
        raise click.UsageError("give CONFIG and --peers, or --smoke.")
    told: dict[str, list[dict[str, float]]] = {"ours": [], "mergekit": []}
    error = None
    for _ in range(runs):
        with tempfile.TemporaryDirectory() as folder:
            at = Path(folder)
            commands = {
                "ours": [sys.executable, "-c", OURS],
                "mergekit": [peers, str(PEER)],
            }
            for name, command in commands.items():
                line = [*command, str(config), str(at / name)]
                told[name].append(run(line, peer=name == "mergekit"))
            if error is None:
                error = compare(at / "ours", at / "mergekit")
    figures = {
        f"{name}_{key}": median(one[key] for one in runs_of)
        for name, runs_of in told.items()
        for key in ("seconds", "peak_bytes")
    }
    ratios = {
        f"{key}_ratio": round(figures[f"ours_{key}"] / figures[f"mergekit_{key}"], 3)
        for key in ("seconds", "peak_bytes")
    }
    line = {"case": config.stem, "error": error, **figures, **ratios, "runs": runs}
    click.echo(json.dumps({**line, **bench.describe_machine()}))


if __name__ == "__main__":
    main()
