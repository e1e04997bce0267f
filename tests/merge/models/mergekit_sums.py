"""Checksums of merged models, for comparison with stored ones of mergekit.

Of each tensor: its norm, and its products with three vectors of random signs. If two
tensors differ by a share d of the norm, the products do so by about d. Rows of the
vocabulary are sorted by token, since the order in which mergekit adds tokens is random.

    MLX_DORA_PEERS_PYTHON=PYTHON python -m tests.merge.models.mergekit_sums

runs mergekit on every file and stores its checksums.
"""

import json
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np

from mlx_dora.io.checkpoint import Checkpoint
from tests.checks import to_numpy
from tests.compat.peer_process import _environment, peers_python
from tests.merge.models.mergekit_models import make_all

HERE = Path(__file__).parent
FILES = sorted((HERE / "mergekit_files").glob("*.yaml"))
STORED = HERE / "mergekit_sums.json"
RANDOM = ("11-dare_ties", "11b-dare_linear", "12-dare_ties-rescale", "41-della",
          "41b-della_linear")  # fmt: skip
"""Files whose method drops entries at random: their moments are compared."""
SEEDS = 20
Sums = dict[str, list[float]]


def by_token(folder: Path, value: np.ndarray) -> np.ndarray:
    """Rows of the vocabulary in the order of the tokens' text; spare rows last."""
    from tokenizers import Tokenizer

    path = str(folder / "tokenizer.json")
    tokens = Tokenizer.from_file(path).get_vocab(with_added_tokens=True)
    ids = [tokens[text] for text in sorted(tokens)]
    rest = sorted(set(range(len(value))) - set(ids))
    return value[[*ids, *rest]]


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    checkpoint = Checkpoint(folder)
    values = {name: to_numpy(checkpoint.tensor(name)) for name in checkpoint.names}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in values:
            values[name] = by_token(folder, values[name])
    return values


def sums_of(folder: Path) -> Sums:
    """By tensor: number of values, norm, and three products with random signs."""
    sums = {}
    for name, value in tensors_of(folder).items():
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        signs = rng.choice([-1.0, 1.0], (3, value.size))
        numbers = [np.linalg.norm(value), *(signs @ value.ravel())]
        sums[name] = [float(value.size), *(float(f"{x:.9g}") for x in numbers)]
    return sums


def differences(ours: Sums, stored: Sums) -> dict[str, float]:
    """By tensor, the greatest difference of a number, as a share of the norm."""
    assert ours.keys() == stored.keys(), set(ours) ^ set(stored)
    worst = {}
    for name, (size, norm, *products) in stored.items():
        own_size, *own = ours[name]
        assert own_size == size, f"{name} has {own_size} values, mergekit's {size}"
        apart = np.abs(np.array(own) - [norm, *products]).max()
        worst[name] = float(apart) / (norm or 1.0)
    return worst


def moments(folders: list[Path], base: Path, reference: Path) -> list[float]:
    """Of a random change: its length, and its share of the reference; mean and spread.

    Both relative to the change of `reference`, which drops nothing.
    """
    start, full = tensors_of(base), tensors_of(reference)
    whole = np.concatenate([(full[n] - start[n]).ravel() for n in start])
    found = []
    for folder in folders:
        own = tensors_of(folder)
        moved = np.concatenate([(own[n] - start[n]).ravel() for n in start])
        size = np.linalg.norm(whole)
        found.append([np.linalg.norm(moved) / size, moved @ whole / size**2])
    mean, spread = np.mean(found, axis=0), np.std(found, axis=0, ddof=1)
    return [float(f"{x:.6g}") for x in (*mean, *spread)]


def reference_of(path: Path) -> str:
    """The file's merge with nothing dropped."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return "\n".join(
        "{}density: 1.0,{}".format(*line.split("density:")[0:1], rest)
        if (rest := line.partition("density:")[2].partition(",")[2])
        else line
        for line in lines
    )


def run_mergekit(jobs: list[list[object]], work: Path) -> list[str | None]:
    (work / "jobs.json").write_text(json.dumps(jobs))
    script = HERE.parents[1] / "compat" / "mergekit_batch.py"
    done = subprocess.run(
        [peers_python("torch", "mergekit"), str(script), "jobs.json"],
        capture_output=True, text=True, timeout=900, cwd=work, env=_environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def made_by_mergekit(work: Path) -> dict[str, object]:
    """Checksums, or moments, of every file that mergekit runs; else its error."""
    make_all(work)
    jobs: list[list[object]] = []
    for path in FILES:
        jobs.append([str(path), f"out/{path.stem}", 0])
        if path.stem in RANDOM:
            (work / path.name).write_text(reference_of(path))
            jobs.append([path.name, f"out/{path.stem}-full", 0])
            jobs += [
                [str(path), f"out/{path.stem}-{seed}", seed]
                for seed in range(1, SEEDS + 1)
            ]
    errors = {
        str(job[1]): e for job, e in zip(jobs, run_mergekit(jobs, work), strict=True)
    }
    made: dict[str, object] = {}
    for path in FILES:
        out = f"out/{path.stem}"
        if errors[out] is not None:
            made[path.stem] = errors[out]
        elif path.stem in RANDOM:
            folders = [work / f"{out}-{seed}" for seed in range(1, SEEDS + 1)]
            made[path.stem] = moments(folders, work / "BASE", work / f"{out}-full")
        else:
            made[path.stem] = sums_of(work / out)
    return made


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        made = made_by_mergekit(Path(folder))
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in made.items()]
    STORED.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    failed = {name: value for name, value in made.items() if isinstance(value, str)}
    sys.stdout.write(
        f"{len(made)} files, mergekit refuses {json.dumps(failed, indent=1)}\n"
    )
