"""Merge the same adapters with PEFT, and fuse them and merge the models with mergekit.

Both run in a separate Python interpreter. The results stay in a work folder and are
not computed again.
"""

import json
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import mlx.core as mx
import yaml

from mlx_dora.adapters.files import load_adapter, save_adapter
from mlx_dora.adapters.hosting import load_lazily
from mlx_dora.fuse.model import fuse_model
from mlx_dora.peft import from_peft, to_peft

_COMPAT = Path(__file__).parents[1] / "tests" / "compat"
# PEFT's `linear`, `ties` and `dare_*` without _svd need equal ranks.
_PEFT: dict[str, dict[str, Any]] = {
    "cat": {},
    "svd": {"svd_full_matrices": False},
    "ties_svd": {"svd_full_matrices": False, "density": 0.2},
    "dare_linear_svd": {"svd_full_matrices": False, "density": 0.5},
}


def by_peft(
    python: str, base: str, adapters: Sequence[str], work: Path
) -> Iterator[tuple[str, Path]]:
    """Yield names and folders of adapters that PEFT merged, in our format."""
    theirs = []
    for i, adapter in enumerate(adapters):
        folder = work / f"peft_{i}"
        if not folder.exists():
            to_peft(load_adapter(adapter), folder, base_model_name_or_path=base)
        theirs.append(str(folder))
    for kind, settings in _PEFT.items():
        out = work / f"peft_{kind}_ours"
        if not out.exists():
            weights = [1 / len(theirs)] * len(theirs)
            job = {
                "model": base,
                "adapters": theirs,
                "out": str(work / f"peft_{kind}"),
                "settings": {"combination_type": kind, **settings, "weights": weights},
            }
            at = work / f"job_{kind}"
            at.mkdir(exist_ok=True)
            (at / "job.json").write_text(json.dumps(job))
            mx.save_safetensors(str(at / "in.safetensors"), {"none": mx.zeros(1)})
            _run([python, str(_COMPAT / "peft_peer.py"), "combine", str(at)])
            save_adapter(from_peft(work / f"peft_{kind}", load_lazily(base)), out)
        yield f"PEFT {kind}", out


def by_mergekit(
    python: str, base: str, adapters: Sequence[str], work: Path
) -> Iterator[tuple[str, Path]]:
    """Yield names and folders of dense models merged by mergekit's definitions."""
    dense = []
    for i, adapter in enumerate(adapters):
        folder = work / f"fused_{i}"
        if not folder.exists():
            fuse_model(base, adapter, folder)
        dense.append(str(folder))

    def plain(weight: float, **more: float) -> list[dict[str, Any]]:
        return [{"model": adapter, "parameters": {"weight": weight, **more}}
                for adapter in dense]  # fmt: skip

    def slerp(first: str, second: str, t: float) -> dict[str, Any]:
        return {"merge_method": "slerp", "base_model": first, "parameters": {"t": t},
                "models": [{"model": first}, {"model": second}]}  # fmt: skip

    def merge(name: str, config: dict[str, Any]) -> Path:
        out = work / f"mergekit_{name}"
        if not out.exists():
            path = work / f"{name}.yaml"
            path.write_text(yaml.safe_dump({**config, "dtype": "float32"}))
            aside = work / f"mergekit_{name}.partial"
            _run([python, str(_COMPAT / "mergekit_peer.py"), str(path), str(aside)])
            aside.rename(out)
        return out

    share = 1 / len(dense)
    configs: dict[str, dict[str, Any]] = {
        "linear": {"merge_method": "linear", "models": plain(share)},
        "karcher": {"merge_method": "karcher", "models": [{"model": m} for m in dense]},
        "task_arithmetic": {
            "merge_method": "task_arithmetic",
            "base_model": base,
            "models": plain(1.0),
        },
        "ties": {
            "merge_method": "ties",
            "base_model": base,
            "models": plain(1.0, density=0.2),
        },
    }
    for name, config in configs.items():
        yield f"mergekit {name}", merge(name, config)

    def both(first: Path, second: str, count: int) -> Path:
        return merge(f"slerp_{count}", slerp(str(first), second, 1 / count))

    yield "mergekit slerp", in_turn(Path(dense[0]), dense[1:], both)


def in_turn(first: Any, others: Sequence[Any], both: Callable[..., Any]) -> Any:
    """Merge more than two inputs by slerp: the k-th joins with weight 1/k."""
    for count, adapter in enumerate(others, start=2):
        first = both(first, adapter, count)
    return first


def _run(command: list[str]) -> None:
    hidden = ("PYTHONPATH", "LD_PRELOAD")
    environment = {k: v for k, v in os.environ.items() if k not in hidden}
    environment |= {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise click.ClickException(done.stderr[-3000:])
