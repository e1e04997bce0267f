"""Memory and traffic of a training whose frozen weights are divided among processes.

Starts one process and then N on this machine, over MLX's ring backend. With ``--shard
full``, each has the same rows per process; with ``tensor``, all have the same rows. The
peak of each process must be at most 1.15 times its share of the base, the largest
gathered weight and the rest; the rest is the peak of the single process less its base.
What a process sends per step is the system's own count, and is compared with the
plan's. Stops if a loss differs from the single process's, for which a batch of all rows
is trained too. Each process prints a JSON line.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, cast

import _harness as bench  # before mlx
import click
import mlx.core as mx
import mlx.nn as nn
from _machine import describe_machine

from mlx_dora import DoRAConfig, load, remove_dora
from mlx_dora.adapters.sharding import load_sharded
from mlx_dora.demo.model import demo_model
from mlx_dora.matrix import packed
from mlx_dora.train import TrainConfig, finetune, plan_memory
from mlx_dora.train.sharded import divide

BOUND = 1.15
LOSS_BOUND = 1e-5
STEPS = 2


def settings_of(job: dict[str, Any]) -> tuple[TrainConfig, DoRAConfig]:
    """The settings of a job, see `main`."""
    train = TrainConfig(
        model=job["model"],
        iters=STEPS,
        batch_size=job["rows"],
        max_seq_length=job["length"] + 1,
        grad_checkpoint=job["grad_checkpoint"],
        fine_tune_type=job["kind"],
        shard=job["shard"] if job["processes"] > 1 else None,
        steps_per_report=1,
        memory_limit=0,
    )
    return train, DoRAConfig(rank=job["rank"], num_layers=job["num_layers"])


def work(jobs: list[dict[str, Any]]) -> None:
    """Run jobs in one of the processes, which loads the model once."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    group = mx.distributed.init()
    # As on a GPU. On a CPU, products with a packed weight unpack it, which is faster.
    packed._CPU_PACKED_ROWS = sys.maxsize
    before = _read()
    if group.size() > 1 and jobs[0]["shard"] == "tensor":
        model, _ = load(jobs[0]["model"], lazy=True)
        divide(model, group, "tensor")
        read = _read() - before
    elif group.size() > 1:
        pending, _ = load_sharded(jobs[0]["model"], group)
        read = _read() - before
        model = pending.finish()
    else:
        model, _ = load(jobs[0]["model"])
        read = _read() - before
    click.echo(json.dumps([{**train(model, job), "read": read} for job in jobs]))


def train(model: nn.Module, job: dict[str, Any]) -> dict[str, Any]:
    """Train a model and return what was measured; the adapter is removed again."""
    from tests.train.sharded import sent_bytes

    group = mx.distributed.init()
    settings, dora = settings_of(job)
    mx.clear_cache()
    base = mx.get_active_memory()
    mx.reset_peak_memory()
    length = job["length"] + 1
    data = [([1 + (i * k) % 200 for i in range(length)], 1) for k in range(3, 11)]
    sent: list[int] = []
    times: list[float] = []

    def note(phase: str, _total: int, _new: int) -> None:
        if phase == "train":
            sent.append(sent_bytes() if sys.platform == "linux" else 0)
            times.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        report = finetune(
            model,
            None,
            data,
            None,
            train=settings,
            dora=dora,
            adapter_path=f"{folder}/a",
            callback=lambda _: None,
            progress=note,
        )
    peak = mx.get_peak_memory()
    remove_dora(model)
    return {
        "processes": group.size(),
        "rank": group.rank(),
        "base": base,
        "peak": peak,
        "sent": sent[1] - sent[0],
        "step_s": round(times[1] - times[0], 3),
        "losses": [r.train_loss for r in report.history if r.train_loss is not None],
    }


def _read() -> int:
    if sys.platform != "linux":
        return 0
    text = Path("/proc/self/io").read_text()
    return int(text.split("rchar: ")[1].split("\n", 1)[0])


def launch(*jobs: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """Run jobs of as many processes; return the results of each process, by rank."""
    count = jobs[0]["processes"]
    with tempfile.TemporaryDirectory() as folder:
        hosts = Path(folder) / "hosts.json"
        hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in _ports(count)]))
        command = [sys.executable, __file__, "--work", json.dumps(jobs)]
        started = []
        for rank in range(count):
            own = {"MLX_HOSTFILE": str(hosts), "MLX_RANK": str(rank)}
            # On a CPU, compiling takes longer than the steps.
            plain = {"MLX_DISABLE_COMPILE": "1"}
            env = {**os.environ, **plain, **(own if count > 1 else {})}
            started.append(
                subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
            )
        try:
            outputs = [process.communicate(timeout=900)[0] for process in started]
        finally:
            for process in started:
                process.kill()
    if any(process.returncode for process in started):
        raise click.ClickException("a process failed")
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def _ports(count: int) -> list[int]:
    channels = [socket.socket() for _ in range(count)]
    for channel in channels:
        channel.bind(("127.0.0.1", 0))
    ports = [channel.getsockname()[1] for channel in channels]
    for channel in channels:
        channel.close()
    return ports


def first_blocks(model: Path, count: int, folder: Path) -> Path:
    """Write a model of the first blocks of another one, for a quick run."""
    for path in model.glob("*.json"):
        shutil.copy(path, folder)
    config = json.loads((model / "config.json").read_text())
    config["num_hidden_layers"] = count
    (folder / "config.json").write_text(json.dumps(config))
    tensors = cast(dict[str, mx.array], mx.load(str(model / "model.safetensors")))
    parts = {name: name.split(".") for name in tensors}
    kept = {
        name: tensors[name]
        for name, words in parts.items()
        if "layers" not in words or int(words[words.index("layers") + 1]) < count
    }
    mx.save_safetensors(str(folder / "model.safetensors"), kept)
    return folder


def compare(job: dict[str, Any]) -> list[dict[str, Any]]:
    """Measure one process and N, and check them against each other."""
    count, rows = job["processes"], job["rows"]
    is_tensor = job["shard"] == "tensor"
    shared = job if is_tensor else {**job, "rows": rows * count}
    single = {"processes": 1}
    ((alone, whole),) = launch({**job, **single}, {**shared, **single})
    train, dora = settings_of(shared)
    lengths = [job["length"] + 1] * 8
    plan = plan_memory(train, dora, lengths=lengths, processes=count)
    assert plan.traffic is not None
    lines = []
    for (result,) in launch(shared):
        for loss, expected in zip(result["losses"], whole["losses"], strict=True):
            if abs(loss - expected) > LOSS_BOUND * abs(expected):
                raise click.ClickException(f"loss {loss}, expected {expected}")
        rest = alone["peak"] - alone["base"]
        share = plan.weights if is_tensor else alone["base"] / count
        bound = share + plan.gathered + rest
        line = {
            "case": "sharded",
            **{name: job[name] for name in ("shard", "kind", "bits", "rank", "length")},
            "grad_checkpoint": job["grad_checkpoint"],
            "rows_per_process": rows,
            "process": result["rank"],
            "processes": count,
            "base": alone["base"],
            "own_base": result["base"],
            "read": result["read"],
            "single_peak": alone["peak"],
            "peak": result["peak"],
            "planned_peak": plan.peak,
            "over_bound": round(result["peak"] / bound, 3),
            "sent": result["sent"],
            "planned_sent": plan.traffic.total,
            "step_s": result["step_s"],
            "single_step_s": alone["step_s"],
        }
        lines.append({**line, **describe_machine()})
    return lines


@click.command(help=__doc__.split("\n", 1)[0] if __doc__ else None)
@bench.options
@click.option("--processes", type=click.IntRange(min=2), default=2, show_default=True)
@click.option("--bits", type=click.Choice(["32", "4"]), default="32", show_default=True)
@click.option("--shard", type=click.Choice(["full", "tensor"]), default="full")
@click.option("--kind", type=click.Choice(["dora", "lora"]), default="dora")
@click.option("--rows", type=int, default=1, help="Rows per process.")
@click.option("--length", type=int, default=128, help="Tokens per row.")
@click.option("--num-layers", type=int, default=-1)
@click.option("--grad-checkpoint", is_flag=True)
@click.option("--work", "worker", hidden=True)
def main(
    settings: bench.Settings,
    processes: int,
    bits: str,
    shard: str,
    kind: str,
    rows: int,
    length: int,
    num_layers: int,
    grad_checkpoint: bool,
    worker: str | None,
) -> None:
    if worker is not None:
        work(json.loads(worker))
        return
    model = demo_model(dtype="q4" if bits == "4" else "float32")
    work_folder = tempfile.TemporaryDirectory()
    if settings.smoke:
        length, num_layers = 16, 1
        model = first_blocks(model, 2, Path(work_folder.name))
    job = {
        "model": str(model),
        "processes": processes,
        "bits": int(bits),
        "shard": shard,
        "kind": kind,
        "rank": 8,
        "rows": rows,
        "length": length,
        "num_layers": num_layers,
        "grad_checkpoint": grad_checkpoint,
    }
    worst = 0.0
    with work_folder:
        lines = compare(job)
    for line in lines:
        click.echo(json.dumps(line))
        if settings.json_file:
            with settings.json_file.open("a") as file:
                file.write(json.dumps(line) + "\n")
        worst = max(worst, line["over_bound"])
    if worst > BOUND:
        raise click.ClickException(f"a peak is {worst:.2f} times its parts")


if __name__ == "__main__":
    main()
