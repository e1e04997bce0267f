"""Cards and uploads, with the real commands and a hub on loopback."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx
import pytest
import yaml

from mlx_dora.adapters.files import load_adapter
from mlx_dora.adapters.recorded_base import recorded_base
from mlx_dora.analyze import analyze_adapter
from mlx_dora.errors import DoRAError
from tests.cli.training_data import write_data
from tests.publish.hub import Hub, serving

MakeFolder = Callable[..., Path]


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving() as server:
        yield server


def run(
    hub: Hub, verb: str, *args: object, token: str = "hf_x"
) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.address,
        "HF_TOKEN": token,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
    }
    return subprocess.run(
        [sys.executable, "-m", f"mlx_dora.{verb}", *map(str, args)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )


def test_a_trained_and_a_fused_folder_arrive_with_their_cards(
    hub: Hub, tiny_model_folder: Path, tmp_path: Path
) -> None:
    data = write_data(tmp_path / "data", train=8, valid=4, test=0)
    adapter, fused = tmp_path / "adapter", tmp_path / "fused"
    trained = run(
        hub, "train", "--model", tiny_model_folder, "--data", data,
        "--adapter-path", adapter, "--iters", 2, "--num-layers", 1,
        "--batch-size", 2, "--rank", 2, "--upload-repo", "adapter",
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr
    assert f"Uploaded to {hub.address}/someone/adapter" in trained.stdout
    assert set(hub.files) >= {"README.md", "adapters.safetensors", "log.jsonl"}
    assert not any(name.startswith(("checkpoints", "best", ".")) for name in hub.files)
    for name, content in hub.files.items():
        assert str(tmp_path).encode() not in content, name
        if name != "adapter_config.json":
            assert (adapter / name).read_bytes() == content, name
    here = json.loads((adapter / "adapter_config.json").read_bytes())
    there = json.loads(hub.files["adapter_config.json"])
    assert here["mlx_dora"]["base"].pop("model") == str(tiny_model_folder)
    assert there["mlx_dora"]["base"].pop("model") is None
    assert here == there
    said = " ".join(trained.stderr.split())
    assert f"path {tiny_model_folder} is not uploaded; whoever" in said
    downloaded = tmp_path / "downloaded"
    for name in ("adapter_config.json", "adapters.safetensors"):
        write(downloaded / name, hub.files[name])
    assert load_adapter(downloaded).tensors
    with pytest.raises(DoRAError, match=r"give the model \(--model\)"):
        recorded_base(downloaded)

    card = hub.files["README.md"].decode()
    head = yaml.safe_load(card.split("---")[1])
    assert head["library_name"] == "mlx"
    assert head["tags"] == ["mlx", "dora", "mlx_dora"]
    assert "base_model" not in head  # a local folder is not a Hub id
    assert "mlx_dora.train --model" in card
    assert "| rank | 2 |" in card
    assert "| iters | 2 |" in card
    assert "| data | data |" in card
    assert str(tmp_path) not in card
    layers = analyze_adapter(load_adapter(adapter), tiny_model_folder).layers
    mean = sum(layer.delta_m for layer in layers) / len(layers)
    assert f"Mean over {len(layers)} matrices: ΔM {mean:.3g} (" in card

    hub.files.clear()
    done = run(
        hub, "fuse", "--model", tiny_model_folder, "--adapter-path", adapter,
        "--save-path", fused, "--upload-repo", "someone/fused",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert set(hub.files) >= {"README.md", "config.json", "model.safetensors"}
    assert "is fused into" in hub.files["README.md"].decode()
    for name, content in hub.files.items():
        assert str(tmp_path).encode() not in content, name
    (tmp_path / "m.safetensors").write_bytes(hub.files["model.safetensors"])
    assert mx.load(str(tmp_path / "m.safetensors"))


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def test_a_snapshot_of_the_hub_is_uploaded_by_its_id(
    hub: Hub,
    make_tiny_folder: MakeFolder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache = tmp_path / "hub"
    base = cache / "models--org--tiny-lm" / "snapshots" / "1a2b3c"
    base.parent.mkdir(parents=True)
    make_tiny_folder().rename(base)
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    data = write_data(tmp_path / "data", train=8, valid=4, test=0)
    command: list[object] = ["--model", base, "--data", data, "--iters", 1]
    command += ["--num-layers", 1, "--batch-size", 2, "--upload-repo", "adapter"]
    old = run(hub, "train", *command, "--adapter-path", tmp_path / "old")
    assert old.returncode == 0, old.stderr
    kept = json.loads((tmp_path / "old" / "adapter_config.json").read_bytes())
    assert kept["mlx_dora"]["base"]["model"] == str(base)  # of an unknown revision
    sent = json.loads(hub.files["adapter_config.json"])
    assert sent["mlx_dora"]["base"]["model"] == "org/tiny-lm"
    assert "its Hub id org/tiny-lm is" in " ".join(old.stderr.split())
    write(cache / "models--org--tiny-lm" / "refs" / "main", b"1a2b3c")
    new = run(hub, "train", *command, "--adapter-path", tmp_path / "new")
    assert new.returncode == 0, new.stderr
    kept = json.loads((tmp_path / "new" / "adapter_config.json").read_bytes())
    assert kept["mlx_dora"]["base"]["model"] == "org/tiny-lm"
    assert "is not uploaded" not in new.stderr


def test_a_card_needs_no_upload(
    hub: Hub, tiny_model_folder: Path, tmp_path: Path
) -> None:
    data = write_data(tmp_path / "data", train=8, valid=4, test=0)
    adapter, fused = tmp_path / "adapter", tmp_path / "fused"
    trained = run(
        hub, "train", "--model", tiny_model_folder, "--data", data,
        "--adapter-path", adapter, "--iters", 1, "--num-layers", 1,
        "--batch-size", 2, "--rank", 2, "--card", token="",
    )  # fmt: skip
    assert f"Model card: {adapter / 'README.md'}" in trained.stdout, trained.stderr
    named = f"adapter_config.json names {tiny_model_folder} on this machine"
    assert named in " ".join(trained.stderr.split())
    done = run(
        hub, "fuse", "--adapter-path", adapter, "--save-path", fused, "--card", token=""
    )
    assert done.returncode == 0, done.stderr
    for folder in (adapter, fused):
        card = (folder / "README.md").read_text()
        assert "| validation loss |" in card
        assert str(tmp_path) not in card
    assert not hub.files


def test_an_upload_that_cannot_succeed_is_refused_before_the_work(
    hub: Hub, tiny_model_folder: Path, tmp_path: Path
) -> None:
    args = ("--model", tiny_model_folder, "--adapter-path", tmp_path / "none")
    bad = run(hub, "train", *args, "--upload-repo", "a/b/c")
    assert bad.returncode == 1
    assert "is not a Hub id" in bad.stderr
    anonymous = run(hub, "fuse", *args, "--upload-repo", "a/b", token="")
    assert anonymous.returncode == 1
    assert "hf auth login" in anonymous.stderr
    assert not (tmp_path / "none").exists()


def test_a_refused_upload_keeps_the_folder_and_says_how_to_continue(
    hub: Hub, tiny_model_folder: Path, tmp_path: Path
) -> None:
    hub.is_closed = True
    data = write_data(tmp_path / "data", train=8, valid=4, test=0)
    result = run(
        hub, "train", "--model", tiny_model_folder, "--data", data,
        "--adapter-path", tmp_path / "adapter", "--iters", 1, "--num-layers", 1,
        "--batch-size", 2, "--upload-repo", "someone/adapter",
    )  # fmt: skip
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert "is complete, but uploading it to someone/adapter failed" in last
    assert "try again with `mlx_dora.publish.upload_folder(" in last
    assert load_adapter(tmp_path / "adapter").tensors


def test_an_upload_without_a_network_is_one_line_and_keeps_the_folder(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "my adapter"
    folder.mkdir()
    (folder / "README.md").write_text("x")
    script = (
        "import sys; from mlx_dora.publish.upload import upload_folder\n"
        "try: upload_folder(sys.argv[1], 'someone/adapter')\n"
        "except ValueError as error: print(type(error).__name__, error)"
    )
    environment = {
        **os.environ,
        "HF_ENDPOINT": "http://127.0.0.1:9",  # the port of `discard`: closed
        "HF_TOKEN": "hf_x",
        "HF_HUB_OFFLINE": "0",
    }
    result = subprocess.run(
        [sys.executable, "-c", script, str(folder)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("DoRAError ")
    assert f"{folder} is complete, but uploading it" in result.stdout
    assert f"try again with `hf upload someone/adapter '{folder}'`" in result.stdout
