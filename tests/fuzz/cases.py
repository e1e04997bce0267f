"""What is damaged, and which command then reads it."""

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from tests.fuzz.material import TRAINING, run
from tests.fuzz.mutate import mutate_file

Dice = random.Random
OUT = "out"
"""The folder inside a case's folder that the command may write."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A damaged input in a folder of its own.

    Attributes:
        kind: What is damaged.
        damage: How.
        action: Reads it; runs in the case's folder.
        what: The action in words.
    """

    kind: str
    damage: str
    action: Callable[[], None]
    what: str


def make_case(number: int, seed: int, material: Path, folder: Path) -> Case:
    """Make the input of one case, the same for the same number and seed."""
    dice = Dice(f"{seed}/{number}")
    folder.mkdir()
    (folder / OUT).mkdir()
    for path in material.iterdir():
        (folder / path.name).symlink_to(path)
    kind = dice.choices(list(_KINDS), [weight for weight, _ in _KINDS.values()])[0]
    _, prepare = _KINDS[kind]
    targets, action, what = prepare(folder, dice)
    damage = [
        mutate_file(dice.choice(targets), dice)
        for _ in range(dice.choice([1, 1, 1, 1, 2, 3]))
    ]
    if kind == "resume" and dice.random() < 0.7:
        _sign(folder / OUT / "a1")
    return Case(kind=kind, damage="; ".join(damage), action=action, what=what)


Prepared = tuple[list[Path], Callable[[], None], str]


def _own(folder: Path, name: str, target: str | None = None) -> Path:
    """Put a copy in place of the link to a piece of the material."""
    source = (folder / name).resolve()
    own = folder / (target or name)
    if own.is_symlink():
        own.unlink()
    if source.is_dir():
        shutil.copytree(source, own)
    else:
        shutil.copyfile(source, own)
    return own


def _command(*args: str) -> tuple[Callable[[], None], str]:
    return lambda: run(*args), f"mlx_dora {' '.join(args)}"


def _adapter(folder: Path, dice: Dice) -> Prepared:
    own = _own(folder, "a1")
    targets = [own / "adapter_config.json", own / "adapters.safetensors"]
    method = dice.choice(["slerp", "linear", "ties", "dare", "task_arithmetic"])
    actions: list[tuple[Callable[[], None], str]] = [
        (_attach, "load and attach"),
        (_attach, "load and attach"),
        (_card, "card"),
        _command("fuse", "--model", "m0", "--adapter-path", "a1",
                 "--save-path", "out/f"),
        _command("convert", "a1", "out/p", "--to", "peft", "--model", "m0"),
        _command("merge", "adapters", "a1", "a2", "--model", "m0", "--method", method,
                 "--save-path", "out/a"),
        _command("analyze", "adapter", "a1", "--model", "m0", "--json", "out/a.json"),
        _command("analyze", "compare", "a1", "a2", "--model", "m0",
                 "--report", "out/a.html"),
    ]  # fmt: skip
    if dice.random() < 0.05:
        actions = [
            _command("evaluate", "--model", "m0", "--adapter-path", "a1",
                     "--data", "data", "--num-batches", "1", "--samples", "1",
                     "--max-tokens", "2")
        ]  # fmt: skip
    return targets, *dice.choice(actions)


def _attach() -> None:
    from mlx_dora import load

    model, _ = load("m0", "a1", check_base=False)
    _check_finite("logits", model(mx.array([[5, 6, 7]])))


def _card() -> None:
    from mlx_dora.publish.card import adapter_card

    text = adapter_card("a1", "m0", ["mlx_dora", "train"], ["data"])
    assert "\x1b" not in text


def _report(folder: Path, dice: Dice) -> Prepared:
    own = _own(folder, "a1")
    return (
        [own / "log.jsonl"],
        *_command(
            "analyze", "adapter", "a1", "--model", "m0", "--report", "out/a.html"
        ),
    )


def _peft(folder: Path, dice: Dice) -> Prepared:
    own = _own(folder, "peft")
    targets = [own / "adapter_config.json", own / "adapter_model.safetensors"]
    model = dice.choice([[], ["--model", "m0"]])
    return targets, *_command("convert", "peft", "out/a", "--to", "mlx", *model)


def _model(folder: Path, dice: Dice) -> Prepared:
    own = _own(folder, "m0", "m")
    (folder / "m0").unlink()
    (folder / "m0").symlink_to("m")
    targets = [
        own / name
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json")
    ] + [own / "model.safetensors"] * 2
    names = {"base": "m", "tuned": "m1"}
    if dice.random() < 0.5:
        names = {"base": "m1", "tuned": "m"}
    actions = [
        _command("fuse", "--model", "m", "--adapter-path", "a1", "--no-check-base",
                 "--save-path", "out/f"),
        _command("analyze", "adapter", "a1", "--model", "m", "--no-check-base"),
        _command("analyze", "models", names["base"], names["tuned"]),
        _command("extract", names["base"], names["tuned"], "--rank", "2",
                 "--save-path", "out/a"),
        _command("merge", "models", names["base"], names["tuned"], "--method",
                 dice.choice(["slerp", "linear"]), "--base", names["base"],
                 "--save-path", "out/m"),
        (_load_model, "load"),
    ]  # fmt: skip
    if dice.random() < 0.1:
        actions = [
            _command("train", *TRAINING, "--iters", "1", "--adapter-path", "out/a"),
            _command("evaluate", "--model", "m", "--data", "data",
                     "--num-batches", "1"),
            _command("merge", "fisher", "--model", "m", "--data", "data",
                     "--save-path", "out/f"),
        ]  # fmt: skip
    return targets, *dice.choice(actions)


def _load_model() -> None:
    from mlx_dora import load

    model, tokenizer = load("m")
    tokenizer.encode("What is 1?")
    mx.eval(model(mx.array([[5, 6, 7]])))


def _resume(folder: Path, dice: Dice) -> Prepared:
    own = folder / OUT / "a1"
    shutil.copytree((folder / "a1").resolve(), own)
    newest = own / "checkpoints" / "4"
    targets = [newest / "state.json"] * 3 + [own / "log.jsonl"]
    targets += [newest / "adapters.safetensors", newest / "optimizer.safetensors"]
    args = ["--iters", "5", "--adapter-path", "out/a1", "--resume"]
    return targets, *_command("train", *TRAINING, *args)


def _sign(adapter: Path) -> None:
    """Make the digests right, as one who means harm would."""
    newest = adapter / "checkpoints" / "4"
    try:
        state = json.loads((newest / "state.json").read_bytes())
        for name in ("adapters.safetensors", "optimizer.safetensors"):
            content = (newest / name).read_bytes()
            state["sha256"][name] = hashlib.sha256(content).hexdigest()
    except (ValueError, TypeError, KeyError, RecursionError):
        return
    (newest / "state.json").write_text(json.dumps(state))


def _fisher(folder: Path, dice: Dice) -> Prepared:
    own = _own(folder, "f0")
    # Information of the first input must be of modules that both inputs have.
    targets = [own / "fisher.json", own / "model.safetensors"]
    targets += [own / "model.safetensors.index.json"]
    both = ["--fisher", "f0", "--fisher", "f1", "--method", "fisher"]
    if dice.random() < 0.5:
        return (
            targets,
            *_command("merge", "models", "m0", "m1", *both, "--save-path", "out/m"),
        )
    return (
        targets,
        *_command("merge", "adapters", "a1", "a2", "--model", "m0", *both,
                  "--save-path", "out/a"),
    )  # fmt: skip


def _mergekit(folder: Path, dice: Dice) -> Prepared:
    own = _own(folder, "mergekit.yaml")
    return (
        [own],
        *_command("merge", "models", "-c", "mergekit.yaml", "--save-path", "out/m"),
    )


def _train_yaml(folder: Path, dice: Dice) -> Prepared:
    own = _own(folder, "train.yaml")
    flags = ["--plan"] if dice.random() < 0.6 else ["--iters", "1"]
    return (
        [own],
        *_command("train", "-c", "train.yaml", "--adapter-path", "out/a", *flags),
    )


def _data(folder: Path, dice: Dice) -> Prepared:
    own = _own(folder, "data")
    if dice.random() < 0.5:
        return (
            [own / "train.jsonl"],
            *_command("train", *TRAINING, "--iters", "1", "--adapter-path", "out/a"),
        )
    return (
        [own / "test.jsonl"],
        *_command("evaluate", "--model", "m0", "--data", "data", "--num-batches", "1"),
    )


_KINDS: dict[str, tuple[int, Callable[[Path, Dice], Prepared]]] = {
    "adapter": (24, _adapter),
    "peft": (14, _peft),
    "model": (14, _model),
    "resume": (8, _resume),
    "report": (8, _report),
    "fisher": (8, _fisher),
    "mergekit": (12, _mergekit),
    "training YAML": (12, _train_yaml),
    "data": (6, _data),
}


class NotFiniteError(Exception):
    """A command took its input and made a number that is none."""


def _check_finite(name: str, value: mx.array) -> None:
    if mx.issubdtype(value.dtype, mx.floating) and not mx.all(mx.isfinite(value)):
        raise NotFiniteError(f"{name} is not finite")


def check_outputs(folder: Path) -> None:
    """Refuse tensors with NaN or inf in what a command wrote.

    Raises:
        NotFiniteError: Naming the first.
    """
    for path in sorted((folder / OUT).rglob("*.safetensors")):
        if "checkpoints" in path.parts:
            continue
        tensors = mx.load(str(path))
        assert isinstance(tensors, dict)
        for name, value in tensors.items():
            _check_finite(f"{path.name}: {name:.60}", value)


def listing(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Every file below a folder but in its `OUT`: size, time of change and inode."""
    found = {}
    for place, folders, files in os.walk(folder):
        if Path(place) == folder and OUT in folders:
            folders.remove(OUT)
        for name in (*files, *folders):
            facts = (Path(place) / name).lstat()
            found[f"{place}/{name}"] = (
                facts.st_size if name in files else 0,
                facts.st_mtime_ns if name in files else 0,
                facts.st_ino,
            )
    return found
