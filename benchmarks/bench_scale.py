"""Time and memory of merging, analyzing, extracting and fusing a model of 1.2 billion.

    python benchmarks/bench_scale.py [--layers 16] [--only extract] [--work FOLDER]
    python benchmarks/bench_scale.py --before FILE [--output FILE]
    python benchmarks/bench_scale.py --smoke

Makes a random model with the shapes of Llama-3.2-1B (bfloat16, 16 blocks, 1.24 billion
parameters, 112 matrices in the blocks), a second one that differs by noise and by an
update of falling singular values in each matrix, and a DoRA adapter of rank 16. They
stay in the work folder and are not made again. Each job runs in a process of its own:
seconds without imports, and the peak resident memory of the process. The extraction's
largest error is compared with the update that was put in.

At the end comes a table: wall time, processor time, and the resident memory at its
peak (85 MB of it are imports); with ``--before``, beside those of an earlier run's
``--output``. Processor time varies less on a machine that is shared.
"""

import _harness as bench  # isort: skip - before mlx

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import mlx.core as mx
from tokenizers import Tokenizer, models

from mlx_dora import DoRAConfig, apply_dora, save_adapter
from mlx_dora.adapters.hosting import load_lazily
from mlx_dora.io.checkpoint import Checkpoint, ShardWriter

COMPAT = Path(__file__).parents[1] / "tests" / "compat"
FILE = click.Path(path_type=Path, dir_okay=False)
COLUMNS = (("seconds", 1, 1), ("cpu_seconds", 1, 1), ("peak_bytes", 1e6, 0))
RANK = 16
JOBS = {
    "merge": "merge_models([base, tuned], method='slerp', save_path=out)",
    "analyze": "analyze_finetune(base, tuned)",
    "extract": f"extract_adapter(base, tuned, rank={RANK}, save_path=out)",
    "adapter": "analyze_adapter(adapter, base)",
    "fuse": "fuse_model(base, adapter, out)",
}
TARGETS = {"extract": "30 s, 1000 MB", "adapter": "8 s", "fuse": "15 s"}
"""For 16 blocks on two cores."""
RUN = """
import json, sys, time
sys.path.insert(0, sys.argv[1])
from peak import peak_bytes
from mlx_dora import openblas
openblas.preload()
from mlx_dora.adapters.hosting import load_lazily
from mlx_dora.analyze import analyze_adapter, analyze_finetune
from mlx_dora.fuse.model import fuse_model
from mlx_dora.merge import merge_models
from mlx_dora.merge.adapters.extract import extract_adapter
base, tuned, adapter, out = sys.argv[2:6]
import mlx_lm
before = peak_bytes()
started, cpu = time.perf_counter(), time.process_time()
result = {job}
record = {{
    "seconds": time.perf_counter() - started,
    "cpu_seconds": time.process_time() - cpu,
    "peak_bytes": peak_bytes(),
    "imports_bytes": before,
}}
layers = getattr(result, "layers", None)
if {is_extract}:
    record["matrices"] = len(layers)
    record["largest_error"] = max(layer.error for layer in layers)
print(json.dumps(record))
"""


def config_of(layers: int, *, is_smoke: bool) -> dict[str, Any]:
    """The config of Llama-3.2-1B, or a tiny one."""
    sizes = (64, 128, 512, 4, 2) if is_smoke else (2048, 8192, 128256, 32, 8)
    hidden, inner, vocabulary, heads, kv = sizes
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocabulary,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }


def make_base(folder: Path, config: dict[str, Any]) -> None:
    """A random model of these sizes, written tensor by tensor."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    tokenizer.save(str(folder / "tokenizer.json"))
    kind = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(kind))
    mx.random.seed(0)
    with ShardWriter(folder) as writer:
        table = 0.02 * mx.random.normal((config["vocab_size"], hidden))
        writer.add("model.embed_tokens.weight", table.astype(mx.bfloat16))
        writer.add("model.norm.weight", mx.ones(hidden, mx.bfloat16))
        for block in range(config["num_hidden_layers"]):
            start = f"model.layers.{block}."
            for name, shape in shapes.items():
                value = (0.02 * mx.random.normal(shape)).astype(mx.bfloat16)
                writer.add(f"{start}{name}.weight", value)
            for name in ("input_layernorm", "post_attention_layernorm"):
                writer.add(f"{start}{name}.weight", mx.ones(hidden, mx.bfloat16))


def make_tuned(base: Path, folder: Path) -> None:
    """Move each matrix of the blocks: noise, and 32 directions of falling size."""
    folder.mkdir()
    (folder / "config.json").write_text((base / "config.json").read_text())
    checkpoint = Checkpoint(base)
    mx.random.seed(1)
    with ShardWriter(folder) as writer:
        for name in checkpoint.names:
            value = checkpoint.tensor(name).astype(mx.float32)
            if "_proj" in name:
                out, width = value.shape
                up = mx.random.normal((out, 32)) * 0.85 ** mx.arange(32)
                down = mx.random.normal((32, width)) * (0.02 / width**0.5)
                value = value + up @ down + 2e-4 * mx.random.normal(value.shape)
            writer.add(name, value.astype(mx.bfloat16))


def make_adapter(base: Path, folder: Path) -> None:
    """A DoRA adapter of every matrix in the blocks."""
    model = load_lazily(base)
    apply_dora(model, DoRAConfig(rank=RANK, scale=2.0, num_layers=-1))
    mx.random.seed(2)
    for _, layer in model.named_modules():
        if "lora_b" in layer:
            shape = layer["lora_b"].shape
            layer["lora_b"] = 1e-3 * mx.random.normal(shape)
    save_adapter(model, folder)


def run_job(name: str, work: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=work) as folder:
        paths = [work / "base", work / "tuned", work / "adapter", Path(folder) / "out"]
        code = RUN.format(job=JOBS[name], is_extract=name == "extract")
        command = [sys.executable, "-c", code, str(COMPAT), *map(str, paths)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise click.ClickException(done.stderr[-2000:])
        return json.loads(done.stdout.splitlines()[-1])


def table_of(records: list[dict[str, Any]], before: list[dict[str, Any]]) -> list[str]:
    """The records as a Markdown table, beside those of an earlier run."""
    earlier = {(record["case"], record["layers"]): record for record in before}
    lines = [
        "| job | wall, s | processor, s | resident memory, MB | target |",
        "| --- | --- | --- | --- | --- |",
    ]
    for record in records:
        old = earlier.get((record["case"], record["layers"]))
        cells = []
        for name, unit, places in COLUMNS:
            values = [part[name] / unit for part in (old, record) if part is not None]
            cells.append(" → ".join(f"{value:.{places}f}" for value in values))
        cells.append(TARGETS.get(record["case"], ""))
        lines.append(f"| {record['case']} | {' | '.join(cells)} |")
    return lines


def read_records(path: Path | None) -> list[dict[str, Any]]:
    if path is None:
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


@click.command(help=__doc__)
@click.option("--layers", default=16, show_default=True, help="Number of blocks.")
@click.option("--only", multiple=True, type=click.Choice([*JOBS]), help="Run these.")
@click.option("--work", type=click.Path(path_type=Path), help="Folder for the models.")
@click.option("--output", type=FILE, help="Append the records to this file.")
@click.option("--before", type=FILE, help="Records of an earlier run.")
@click.option("--smoke", "is_smoke", is_flag=True, help="A tiny model.")
def main(
    layers: int,
    only: tuple[str, ...],
    work: Path | None,
    output: Path | None,
    before: Path | None,
    is_smoke: bool,
) -> None:
    earlier, records = read_records(before), []
    with tempfile.TemporaryDirectory() as temporary:
        at = work or Path(temporary)
        layers = 2 if is_smoke else layers
        if not (at / "base").exists():
            make_base(at / "base", config_of(layers, is_smoke=is_smoke))
        if not (at / "tuned").exists():
            make_tuned(at / "base", at / "tuned")
        if not (at / "adapter").exists():
            make_adapter(at / "base", at / "adapter")
        for name in only or JOBS:
            record = {"case": name, "layers": layers, **run_job(name, at)}
            records.append(record)
            line = json.dumps({**record, **bench.describe_machine()})
            click.echo(line)
            if output is not None:
                with output.open("a", encoding="utf-8") as file:
                    file.write(f"{line}\n")
    click.echo("\n".join(table_of(records, earlier)))


if __name__ == "__main__":
    main()
