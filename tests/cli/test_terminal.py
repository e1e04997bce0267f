"""Text from files on a real terminal is shown, never interpreted."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from mlx_dora import DoRAConfig, apply_dora, load, save_adapter
from tests.processes import Process

HOSTILE = "\x1b]0;TITLE\x07\x1b[2J\x1b[31m"
SHOWN = rb"\x1b]0;TITLE\x07\x1b[2J\x1b[31m"


def on_a_terminal(folder: Path, *args: str) -> bytes:
    """Return what a command sends to a terminal through stdout and stderr."""
    own, theirs = os.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "200"}
    process = Process(
        ["-m", "mlx_dora", *args],
        cwd=folder,
        stdout=theirs,
        stderr=theirs,
        env=environment,
    )
    os.close(theirs)
    output = b""
    try:
        while data := os.read(own, 65536):
            output += data
    except OSError:  # Linux's sign that the other end is closed
        pass
    finally:
        os.close(own)
    process.wait()
    return output


@pytest.fixture
def place(tiny_model_folder: Path, tmp_path: Path) -> Path:
    """Return a folder with a model ``tiny`` and an adapter ``a``."""
    model = load(str(tiny_model_folder))[0]
    apply_dora(model, DoRAConfig(rank=2, num_layers=-1))
    save_adapter(model, tmp_path / "a")
    return tmp_path


def edit(path: Path, change: Callable[[dict], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def rename_tensor(path: Path, old: str, new: str) -> None:
    raw = path.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    text = raw[8 : 8 + size].replace(old.encode(), json.dumps(new)[1:-1].encode())
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])


def hostile_tensor_name(place: Path) -> tuple[str, ...]:
    old = "model.layers.0.self_attn.q_proj.lora_a"
    rename_tensor(place / "a" / "adapters.safetensors", old, f"{HOSTILE}.lora_a")
    return "analyze", "adapter", "a", "--model", "tiny"


def hostile_base_name(place: Path) -> tuple[str, ...]:
    base = {"model": f"{HOSTILE}evil", "fingerprint": "sha256:00"}
    edit(place / "a" / "adapter_config.json", lambda c: c["mlx_dora"].update(base=base))
    return "analyze", "adapter", "a", "--model", "tiny"


def hostile_sample(place: Path) -> tuple[str, ...]:
    row = json.dumps({"prompt": f"x{HOSTILE}", "completion": "y"})
    (place / "d").mkdir()
    for split in ("train", "valid"):
        (place / "d" / f"{split}.jsonl").write_text(row + "\n")
    return (
        "evaluate", "--model", "tiny", "--data", "d", "--adapter-path", "a",
        "--samples", "1", "--max-tokens", "2", "--num-batches", "1",
    )  # fmt: skip


def hostile_model_type(place: Path) -> tuple[str, ...]:
    edit(place / "tiny" / "config.json", lambda c: c.update(model_type=HOSTILE))
    return "analyze", "adapter", "a", "--model", "tiny", "--no-check-base"


def hostile_log(place: Path) -> tuple[str, ...]:
    (place / "a" / "log.jsonl").write_text(json.dumps({"step": HOSTILE}) + "\n")
    return "analyze", "adapter", "a", "--model", "tiny", "--report", "r.html"


def hostile_yaml_key(place: Path) -> tuple[str, ...]:
    (place / "c.yaml").write_text(json.dumps({HOSTILE: 1}))
    return "train", "-c", "c.yaml"


def hostile_argument(place: Path) -> tuple[str, ...]:
    return "train", "--iters", HOSTILE


def hostile_folder(place: Path) -> tuple[str, ...]:
    shutil.copytree(place / "tiny", place / HOSTILE)
    return "analyze", "adapter", "a", "--model", HOSTILE, "--json", f"{HOSTILE}.json"


@pytest.mark.parametrize(
    "prepare",
    [
        hostile_tensor_name,
        hostile_base_name,
        hostile_sample,
        hostile_model_type,
        hostile_log,
        hostile_yaml_key,
        hostile_argument,
        hostile_folder,
    ],
)
def test_control_characters_are_shown_and_not_sent(
    place: Path, prepare: Callable[[Path], tuple[str, ...]]
) -> None:
    output = on_a_terminal(place, *prepare(place))
    assert b"TITLE\x07" not in output
    assert b"\x1b[2J" not in output
    assert SHOWN in output, output[-600:]
    assert b"Traceback" not in output
