"""mlx-lm's own commands with our layers. Few tests, since each starts a process."""

import importlib
import json
import os
import socket
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from subprocess import DEVNULL

import pytest
from click.testing import CliRunner

from mlx_dora import DoRAConfig, apply_dora, load, save_adapter
from mlx_dora.cli.generate import command
from mlx_dora.errors import DoRAError
from tests.processes import Process, run

ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "80"}


@pytest.fixture
def adapter(tiny_model_folder: Path, tmp_path: Path) -> Path:
    model = load(str(tiny_model_folder))[0]
    apply_dora(model, DoRAConfig(rank=2, num_layers=-1))
    save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter"


def generate(*args: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(command, args)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def test_generate_runs_an_adapter_on_our_layers(
    tiny_model_folder: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_dora import DoRALinear

    ran: list[str] = []
    forward = DoRALinear.__call__
    monkeypatch.setattr(
        DoRALinear,
        "__call__",
        lambda self, x: ran.append("ours") or forward(self, x),
    )
    paths = ("--model", str(tiny_model_folder), "--adapter-path", str(adapter))
    code, output, _ = generate(*paths, "--prompt", "fox", "--max-tokens", "2")
    assert code == 0
    assert "Generation: 2 tokens" in output
    assert ran


def test_arguments_reach_mlx_lm_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    # `mlx_lm.generate` is a function, but the command runs the module of that name.
    module = importlib.import_module("mlx_lm.generate")
    seen: list[list[str]] = []
    monkeypatch.setattr(module, "main", lambda: seen.append(sys.argv))
    before = sys.argv
    args = ["--prompt", "--", "-", "-x=1", "", "a b", "--config", "--"]
    assert generate(*args)[0] == 0
    assert seen[0][1:] == args
    assert sys.argv is before


@pytest.mark.parametrize("spelling", ["apart", "joined"])
def test_the_base_recorded_by_the_adapter_is_used(
    tiny_model_folder: Path, tmp_path: Path, spelling: str
) -> None:
    from mlx_dora.cli._base_model import with_recorded_base

    model = load(str(tiny_model_folder))[0]
    apply_dora(model, DoRAConfig(rank=2, num_layers=-1))
    adapter, base = str(tmp_path / "known"), str(tiny_model_folder)
    save_adapter(model, adapter, base_model=base)
    named = {
        "apart": ["--adapter-path", adapter],
        "joined": [f"--adapter-path={adapter}"],
    }[spelling]
    assert with_recorded_base([*named, "--prompt", "x"]) == [
        "--model", base, *named, "--prompt", "x"
    ]  # fmt: skip
    assert with_recorded_base([*named, "--model=b"]) == [*named, "--model=b"]
    assert with_recorded_base(["--prompt", "x"]) == ["--prompt", "x"]


def test_help_is_ours_and_then_mlx_lms_own() -> None:
    code, output, _ = generate("--help")
    assert code == 0
    ours, theirs = output.split("Options of mlx-lm, which apply too:")
    assert ours.startswith("Usage: generate ")
    assert "--log-file" in ours
    assert theirs.strip().startswith("usage: generate ")
    assert "--max-tokens" in theirs


def test_wrong_flags_exit_with_2() -> None:
    assert generate("--no-such-flag")[0] == 2


def test_bad_input_is_one_line(tiny_model_folder: Path, adapter: Path) -> None:
    model = ("--model", str(tiny_model_folder))
    weights = adapter / "adapters.safetensors"
    missing = str(adapter / "no" / "such")
    for args in (
        ("--model", missing),
        ("--model", "no-such-organisation/no-such-model"),
        ("--model", str(adapter)),  # a folder without config.json
        (*model, "--adapter-path", missing),
    ):
        code, output, errors = generate(*args, "--prompt", "a")
        assert (code, output) == (1, ""), args
        loading, error = errors.strip().splitlines()
        assert loading == f"Loading {args[1]} ..."
        assert error.startswith("Error: ")
    weights.write_bytes(weights.read_bytes()[:-4])
    adapted = (*model, "--adapter-path", str(adapter))
    code, _, errors = generate("-q", *adapted, "--prompt", "a")
    assert code == 1
    assert len(errors.strip().splitlines()) == 1  # the error


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json"])
def test_a_truncated_model_is_one_line(tiny_model_folder: Path, file: str) -> None:
    path = tiny_model_folder / file
    path.write_bytes(path.read_bytes()[:-40])
    words = ("-q", "--model", str(tiny_model_folder), "--prompt", "a")
    code, output, errors = generate(*words)
    assert (code, output) == (1, "")
    assert errors.startswith("Error: ")
    assert len(errors.strip().splitlines()) == 1


def test_bugs_in_our_layers_keep_their_traceback(
    tiny_model_folder: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_dora import DoRALinear

    def broken(self: DoRALinear, x: object) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(DoRALinear, "__call__", broken)
    paths = ("--model", str(tiny_model_folder), "--adapter-path", str(adapter))
    with pytest.raises(ValueError, match="a bug") as caught:
        generate(*paths, "--prompt", "fox", "--max-tokens", "1")
    assert not isinstance(caught.value, DoRAError)


def test_chat_answers(tiny_model_folder: Path, adapter: Path) -> None:
    paths = ("--model", tiny_model_folder, "--adapter-path", adapter)
    done = run(
        ["-m", "mlx_dora", "chat", *paths, "--max-tokens", "2"],
        input="hello\nq\n",
        env=ENVIRONMENT,
    )
    assert done.returncode == 0, done.stderr


def test_server_chats_with_an_adapter(tiny_model_folder: Path, adapter: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = ("--model", str(tiny_model_folder), "--adapter-path", str(adapter))
    server = Process(
        ["-m", "mlx_dora", "server", *paths, "--port", port],
        env=ENVIRONMENT,
        stdout=DEVNULL,
    )
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions",
        data=json.dumps(
            {"messages": [{"role": "user", "content": "fox?"}], "max_tokens": 2}
        ).encode(),
        headers={"Content-Type": "application/json"},
    )
    try:
        answer = None
        for _ in range(300):
            try:
                with urllib.request.urlopen(request, timeout=60) as response:
                    answer = json.load(response)
                break
            except (ConnectionError, urllib.error.URLError):
                assert server.poll() is None, server.communicate()[1]
                time.sleep(0.2)
        assert answer is not None
        assert answer["usage"]["completion_tokens"] == 2
        assert answer["choices"][0]["message"]["role"] == "assistant"
    finally:
        server.terminate()
        server.communicate(timeout=30)
