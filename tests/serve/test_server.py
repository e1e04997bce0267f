"""Tests of a real server process with a tiny model, shared by the module."""

import http.client
import json
import random
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_dora import DoRAConfig, apply_dora, load, save_adapter
from tests.serve.base import write_tiny_base
from tests.serve.client import CHAT, COMPLETIONS, GOOD, Server


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, an adapter inside a root, and an adapter outside it."""
    folder = tmp_path_factory.mktemp("served")
    base = folder / "base"
    write_tiny_base(base)
    (folder / "root").mkdir()
    for path, seed in (("root/poems", 1), ("outside", 2)):
        adapted = load(str(base))[0]
        apply_dora(adapted, DoRAConfig(rank=2, num_layers=-1))
        mx.random.seed(seed)
        for _, module in adapted.named_modules():
            if "lora_b" in module:
                module["lora_b"] = mx.random.normal(module["lora_b"].shape)
        save_adapter(adapted, folder / path)
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    server = Server("--model", folder / "base", "--adapter-root", folder / "root")
    yield server.ready()
    server.stop()


DEADLY: list[dict[str, Any]] = [  # each ends mlx-lm's generation thread
    {"prompt": ""},
    {"prompt": ["a"]},
    {"prompt": []},
    {"prompt": "x", "logit_bias": {"99999": 1}},
    {"prompt": "x", "logit_bias": {"-99999": 1}},
    {"prompt": "x", "stop": 5},
    {"prompt": "x", "stop": [["a"]]},
    {"prompt": "x", "stop": "\ud83d"},
    {"prompt": "x", "temperature": 1, "top_k": 10**6},
    {"prompt": "x", "temperature": 10**400},
]


@pytest.mark.parametrize("body", DEADLY, ids=str)
def test_a_request_that_would_stop_the_server_is_refused(
    body: dict[str, Any], server: Server
) -> None:
    status, answer = server.ask({"max_tokens": 2, **body})
    assert status == 400
    assert isinstance(answer["error"], str)
    assert server.ask(GOOD)[0] == 200


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 100_000,
        b'{"prompt": "x", "max_tokens": ' + b"9" * 5000 + b"}",
        b'{"prompt": "\xff"}',
        b"{'prompt'",
        b"[]",
        b"null",
        b"",
    ],
)
def test_a_body_other_than_an_object_is_refused(content: bytes, server: Server) -> None:
    status, answer = server.send(content, COMPLETIONS)
    assert status == 400
    assert isinstance(answer["error"], str)
    assert server.ask(GOOD)[0] == 200


@pytest.mark.parametrize(("length", "status"), [("-1", 400), ("9" * 30, 413)])
def test_an_impossible_length_is_refused(
    length: str, status: int, server: Server
) -> None:
    headers = {"Content-Length": length}
    assert server.send(b"", COMPLETIONS, **headers)[0] == status


def test_values_of_wrong_types_never_stop_the_server(server: Server) -> None:
    keys = [
        *("prompt", "messages", "stop", "logit_bias", "max_tokens", "temperature"),
        *("top_p", "top_k", "min_p", "seed", "stream", "stream_options", "logprobs"),
        *("top_logprobs", "model", "adapters", "draft_model", "tools", "role_mapping"),
        *("repetition_penalty", "repetition_context_size", "xtc_probability"),
        *("chat_template_kwargs", "num_draft_tokens", "presence_penalty"),
    ]
    values = [
        *(None, True, 0, -1, 1.5, 2**70, -(10**400), "", "x", "\0", [], [0], [""]),
        *([None], {}, {"a": 1}, {"1": 1}, {"role": "user"}, [{"role": "user"}]),
        *(float("nan"), float("inf"), [[1]], [{"role": "user", "content": [5]}]),
    ]
    random_ = random.Random(0)
    for _ in range(120):
        path = random_.choice([COMPLETIONS, CHAT])
        body: dict[str, Any] = {"max_tokens": 1, "prompt": "fox"}
        body["messages"] = [{"role": "user", "content": "fox"}]
        for key in random_.sample(keys, 2):
            body[key] = random_.choice(values)
        if body.get("stream") is True:
            del body["stream"]  # its answer is not JSON
        status, _ = server.ask(body, path)
        assert status in (200, 400, 404), body
    assert server.ask(GOOD)[0] == 200
    assert server.process.poll() is None


def test_an_adapter_is_used_without_a_model__mlx_lm_1248(
    server: Server, folder: Path
) -> None:
    plain = server.text()
    adapted = server.text(adapters="poems")
    model, tokenizer = load(str(folder / "base"), str(folder / "root" / "poems"))
    import mlx_lm

    prompt: Any = GOOD["prompt"]
    expected = mlx_lm.generate(model, tokenizer, prompt, max_tokens=4)
    assert adapted == expected != plain
    named = {"model": str(folder / "base")}
    assert server.text(**named) == plain
    assert server.text(adapters="poems", **named) == adapted
    assert server.text() == plain


@pytest.mark.parametrize("model", [{}, {"model": "default_model"}])
def test_a_missing_adapter_is_an_error__mlx_lm_229(
    model: dict[str, str], server: Server
) -> None:
    status, answer = server.ask({**GOOD, **model, "adapters": "no-such-folder"})
    assert status == 404
    assert "'no-such-folder' is not served" in answer["error"]


def test_paths_outside_the_root_are_refused(server: Server, folder: Path) -> None:
    for key, name in (
        ("adapters", "../outside"),
        ("adapters", str(folder / "outside")),
        ("model", str(folder / "outside")),
        ("model", "/etc"),
        ("draft_model", "/etc"),
        ("model", "no-such-organisation/no-such-model"),
    ):
        status, answer = server.ask({**GOOD, key: name})
        assert (status, "is not served" in answer["error"]) == (404, True), name


def test_a_chat_that_the_template_refuses_is_answered_400(server: Server) -> None:
    body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
    assert server.ask(body, CHAT)[0] == 200
    assert server.ask({**body, "chat_template_kwargs": {"messages": 1}}, CHAT)[0] == 400
    calls = [{"function": {"name": "f", "arguments": "{"}}]
    body["messages"] += [{"role": "assistant", "tool_calls": calls}]
    assert server.ask(body, CHAT)[0] == 400


def test_stream_options_need_not_ask_for_usage(server: Server) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    body = {**GOOD, "stream": True, "stream_options": {}}
    connection.request("POST", COMPLETIONS, json.dumps(body).encode())
    assert connection.getresponse().read().endswith(b"data: [DONE]\n\n")


def test_the_process_ends_when_its_generation_thread_dies(folder: Path) -> None:
    program = (
        "from mlx_dora import openblas; openblas.preload()\n"
        "from mlx_lm.generate import BatchGenerator\n"
        "def die(self): raise RuntimeError('out of\\nmemory')\n"
        "BatchGenerator.next = die\n"
        "from mlx_dora.cli.server import command\n"
        "command(prog_name='server')\n"
    )
    server = Server("--model", folder / "base", program=program).ready()
    status, answer = server.ask(GOOD)
    assert status == 503
    assert "generation thread died" in answer["error"]
    errors = server.process.communicate(timeout=30)[1]
    assert server.process.returncode == 1
    assert "Traceback" not in errors
    last = errors.strip().splitlines()[-1]
    assert last.startswith("Error: the generation thread died of RuntimeError: out of")


def test_a_missing_model_is_a_one_line_error() -> None:
    process = Server("--model", "no/such/folder").process
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert "Traceback" not in errors
    assert "no/such/folder" in errors.strip().splitlines()[-1]


def invoke(*args: str) -> tuple[int, str, str]:
    from click.testing import CliRunner

    from mlx_dora.cli.server import command

    result = CliRunner().invoke(command, args)
    return result.exit_code, result.stdout, result.stderr


def test_a_missing_adapter_root_is_a_one_line_error() -> None:
    code, _, errors = invoke("--adapter-root", "no-such-folder")
    assert code == 1
    assert errors == "Error: --adapter-root no-such-folder is not a folder.\n"


def test_a_port_in_use_is_a_one_line_error() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        code, _, errors = invoke("--port", str(taken.getsockname()[1]))
    assert code == 1
    first, error = errors.splitlines()
    assert first == "Starting the server ..."
    assert "Address already in use" in error


def test_help_names_the_added_option() -> None:
    code, output, _ = invoke("--help")
    assert code == 0
    assert "--adapter-path" in output
    assert "--adapter-root DIR" in output
