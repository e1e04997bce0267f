"""Time the analysis of an adapter and of two checkpoints, relative to a floor.

    python benchmarks/bench_analyze.py [--model PATH] [--rank 8] [--runs 5]
    python benchmarks/bench_analyze.py --smoke

The floor is the least that an analysis could cost: read the weights from their files
once and compute the norms of their rows. The adapter is on every linear layer, with
random factors. The files are in the page cache. Peak memory counts MLX and Python
together, relative to the model's largest matrix.
"""

import _harness as bench  # isort: skip - before mlx

import tempfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import mlx.core as mx
import numpy as np
from mlx_lm.models import llama
from mlx_lm.utils import save_config

from mlx_dora import DoRAConfig, apply_dora, load_adapter, save_adapter
from mlx_dora.adapters.hosting import load_lazily
from mlx_dora.adapters.keys import natural_order
from mlx_dora.adapters.surgery import adapter_layers
from mlx_dora.analyze import analyze_adapter, analyze_finetune
from mlx_dora.analyze.result import AdaptationAnalysis
from mlx_dora.demo.model import demo_model
from mlx_dora.io.checkpoint import Checkpoint


def make_tiny(folder: Path) -> Path:
    mx.random.seed(0)
    arguments = {
        "model_type": "llama",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "rms_norm_eps": 1e-5,
        "vocab_size": 64,
    }
    folder.mkdir()
    save_config(dict(arguments), folder / "config.json")
    llama.Model(llama.ModelArgs(**arguments)).save_weights(
        str(folder / "model.safetensors")
    )
    return folder


def make_adapter(model: Path, rank: int, folder: Path) -> list[str]:
    """Make an adapter with random factors and magnitudes close to the norms."""
    adapted = load_lazily(model)
    apply_dora(adapted, DoRAConfig(rank=rank, scale=2.0, num_layers=-1))
    mx.random.seed(1)
    layers = dict(adapter_layers(adapted))
    for layer in layers.values():
        layer.lora_b = 0.01 * mx.random.normal(layer.lora_b.shape)
        layer.m = layer.m * (1 + 0.01 * mx.random.normal(layer.m.shape))
    save_adapter(adapted, folder)
    return sorted(layers, key=natural_order)


def make_tuned(model: Path, names: list[str], folder: Path) -> None:
    """Write the model's matrices with each entry moved by about a hundredth."""
    files = Checkpoint(model)
    moved = {}
    for name in names:
        value = files.tensor(name).astype(mx.float32)
        moved[name] = value + 0.01 * mx.std(value) * mx.random.normal(value.shape)
    folder.mkdir()
    mx.save_safetensors(str(folder / "model.safetensors"), moved)


def row_norms(folder: Path, names: list[str]) -> list[mx.array]:
    """Read every matrix once and compute the norms of its rows."""
    files, norms = Checkpoint(folder), []
    for name in names:
        norm = mx.linalg.norm(files.tensor(name).astype(mx.float32), axis=1)
        mx.eval(norm)
        norms.append(norm)
    return norms


def outcome(analysis: AdaptationAnalysis) -> list[mx.array]:
    return [mx.array([layer.delta_m, layer.delta_d]) for layer in analysis.layers]


def dense_adapter(model: Path, adapter: Path, paths: list[str]) -> list[mx.array]:
    """Compute ΔM and ΔD of every matrix from W', in float64."""
    files, factors = Checkpoint(model), load_adapter(adapter).tensors
    expected = []
    for path in paths:
        a, b, m = (
            np.array(factors[f"{path}.{leaf}"], np.float64)
            for leaf in ("lora_a", "lora_b", "m")
        )
        base = np.array(files.tensor(f"{path}.weight").astype(mx.float32), np.float64)
        rows = base + 2.0 * (a @ b).T
        expected.append(
            _dense(base, m[:, None] * rows / np.linalg.norm(rows, axis=1)[:, None])
        )
    return expected


def dense_pair(before: Path, after: Path, names: list[str]) -> list[mx.array]:
    first, second = Checkpoint(before), Checkpoint(after)
    return [
        _dense(
            *(
                np.array(files.tensor(name).astype(mx.float32), np.float64)
                for files in (first, second)
            )
        )
        for name in names
    ]


def _dense(before: np.ndarray, after: np.ndarray) -> mx.array:
    norms = [np.linalg.norm(rows, axis=1) for rows in (before, after)]
    unit = [
        rows / norm[:, None] for rows, norm in zip((before, after), norms, strict=True)
    ]
    chord = np.square(unit[0] - unit[1]).sum(axis=1) / 2
    return mx.array([np.abs(norms[1] - norms[0]).mean(), chord.mean()])


def peak_bytes(job: Callable[[], Any]) -> int:
    """Return MLX's peak above what was alive, and Python's, in the same job."""
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    tracemalloc.start()
    job()
    python = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return mx.get_peak_memory() - before + python


@click.command(help=__doc__)
@bench.options
@click.option("--model", type=click.Path(exists=True, path_type=Path))
@click.option("--rank", default=8, show_default=True)
def main(settings: bench.Settings, model: Path | None, rank: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        at = Path(folder)
        if settings.smoke:
            model = make_tiny(at / "model")
        base = model or demo_model()
        paths = make_adapter(base, rank, at / "adapter")
        names = [f"{path}.weight" for path in paths]
        make_tuned(base, names, at / "tuned")
        make_tuned(base, names, at / "base")
        largest = max(
            4 * int(np.prod(files.info(name).shape))
            for files in [Checkpoint(base)]
            for name in files.names
        )
        both = (at / "base", at / "tuned")
        adapter = lambda: analyze_adapter(at / "adapter", base)  # noqa: E731
        pair = lambda: analyze_finetune(*both)  # noqa: E731
        jobs = {
            "adapter": (adapter, lambda: row_norms(base, names),
                        lambda: dense_adapter(base, at / "adapter", paths)),
            "models": (pair, lambda: [row_norms(f, names) for f in both],
                       lambda: dense_pair(*both, names)),
        }  # fmt: skip
        for name, (job, floor, expected) in jobs.items():
            peak = peak_bytes(job)
            case = bench.Case(
                name=name,
                dtype="float32",
                contenders=[
                    bench.Contender(name="floor", run=floor),
                    bench.Contender(
                        name="analysis",
                        run=lambda job=job: outcome(job()),
                        expected=expected,
                        bound=1e-5,
                    ),
                ],
                baseline="floor",
                facts={
                    "matrices": len(names),
                    "rank": rank,
                    "analysis_peak_bytes": peak,
                    "peak_over_largest": round(peak / largest, 3),
                },
            )
            bench.report(bench.measure(case, settings))


if __name__ == "__main__":
    main()
