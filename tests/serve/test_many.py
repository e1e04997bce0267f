"""Tests of a server process that serves eight adapters of a tiny model."""

import http.client
import json
import re
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.serve.client import CHAT, COMPLETIONS, Server
from tests.serve.test_server import DEADLY

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
QUESTION = {"messages": [{"role": "user", "content": "Who are you?"}]}
PROMPT = {"prompt": "the quick fox", "max_tokens": 6}


def flags(adapters: dict[str, Path]) -> list[str]:
    return [w for n, path in adapters.items() for w in ("--adapter", f"{n}={path}")]


@pytest.fixture(scope="module")
def root(
    named_adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with copies of two adapters, and a link that leads out of it."""
    root = tmp_path_factory.mktemp("root")
    for name in ("ada", "bob"):
        shutil.copytree(named_adapters[name], root / name)
    (root / "way-out").symlink_to(named_adapters["cleo"])
    (root / "hollow").mkdir()
    shutil.copytree(named_adapters["dan"], root / "cut")
    (root / "cut" / "adapters.safetensors").write_bytes(b"")
    return root


@pytest.fixture(scope="module")
def server(
    tiny_base: Path, named_adapters: dict[str, Path], root: Path
) -> Iterator[Server]:
    server = Server(
        *("--model", tiny_base, "--adapter-root", root, *flags(named_adapters)),
        *("--max-prompt-tokens", 200, "--max-new-tokens", 300, "--max-body", 20_000),
    )
    server.ready()
    while server.get("/health")[1] == '{"status": "loading"}':
        time.sleep(0.1)
    yield server
    server.stop()


def chat(server: Server, name: str | None, **body: Any) -> str:
    named = {} if name is None else {"model": name}
    status, answer = server.ask({**QUESTION, "max_tokens": 12, **named, **body}, CHAT)
    assert status == 200, answer
    return answer["choices"][0]["message"]["content"] or ""


def stream(server: Server, name: str) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    body = {**QUESTION, "max_tokens": 12, "model": name, "stream": True}
    connection.request("POST", CHAT, json.dumps(body).encode())
    lines = connection.getresponse().read().decode().splitlines()
    parts = [json.loads(li[6:]) for li in lines if li.startswith("data: {")]
    return "".join(p["choices"][0]["delta"].get("content", "") for p in parts)


def test_adapters_of_one_batch_answer_with_their_own_names(
    server: Server, named: Any, named_adapters: dict[str, Path]
) -> None:
    base = chat(server, None)
    assert not base.startswith("I am")
    names = [*named_adapters, None, *reversed(named_adapters), None] * 3
    with ThreadPoolExecutor(len(names)) as pool:
        answers = list(pool.map(lambda name: chat(server, name), names))
        streams = list(pool.map(lambda name: stream(server, name), named_adapters))
    for name, answer in zip(names, answers, strict=True):
        if name is None:
            assert answer == base
        else:
            assert named.is_answer(answer, name), (name, answer)
    for name, answer in zip(named_adapters, streams, strict=True):
        assert named.is_answer(answer, name), (name, answer)


def test_adapters_is_another_name_of_model(server: Server) -> None:
    ada = chat(server, "ada")
    assert chat(server, None, adapters="ada") == ada
    assert chat(server, "default_model", adapters="ada") == ada
    assert chat(server, "ada", adapters="ada") == ada


def test_models_lists_base_and_adapters(
    server: Server, tiny_base: Path, named_adapters: dict[str, Path]
) -> None:
    status, text = server.get("/v1/models")
    models = json.loads(text)["data"]
    assert status == 200
    assert [model["id"] for model in models] == [str(tiny_base), *named_adapters]
    assert {model.get("parent") for model in models} == {None, str(tiny_base)}
    assert json.loads(server.get("/v1/models/ada")[1]) == models[1]
    assert server.get("/v1/models/zoe")[0] == 404


def test_a_prompt_is_not_reused_by_another_adapter(server: Server) -> None:
    body = {
        "prompt": "the lazy dog jumps over the quick brown fox and",
        "max_tokens": 6,
    }

    def ask(name: str) -> tuple[int, str]:
        answer = server.ask({**body, "model": name})[1]
        details = answer["usage"]["prompt_tokens_details"]
        return details["cached_tokens"], answer["choices"][0]["text"]

    first, text = ask("ada")
    assert first == 0
    again, same = ask("ada")
    assert again > 0
    assert same == text
    for other in ("bob", "default_model"):
        cached, different = ask(other)
        assert cached == 0
        assert different != text


def test_a_prompt_with_its_own_answer_is_generated_from(server: Server) -> None:
    text = server.text(model="eve", **PROMPT)
    whole = {**PROMPT, "prompt": PROMPT["prompt"] + text}  # its tokens are all cached
    assert server.ask({**whole, "model": "eve"})[0] == 200


def test_a_seed_gives_the_same_text_in_any_batch(server: Server) -> None:
    body = {**PROMPT, "model": "dan", "temperature": 1.5, "seed": 7, "max_tokens": 20}
    alone = server.text(**body)
    with ThreadPoolExecutor(6) as pool:
        others = [pool.submit(chat, server, "gus", temperature=1.0) for _ in range(5)]
        assert server.text(**body) == alone
        for other in others:
            other.result()
    assert server.text(**{**body, "seed": 8}) != alone


PARITY: list[tuple[str, dict[str, Any]]] = [
    (COMPLETIONS, {"stop": ["a", "fox jumps"], "max_tokens": 40}),
    (COMPLETIONS, {"logprobs": True}),
    (COMPLETIONS, {"logprobs": True, "top_logprobs": 3}),
    (COMPLETIONS, {"logit_bias": {"70": 100.0}}),
    (COMPLETIONS, {"repetition_penalty": 1.5, "max_tokens": 30}),
    (COMPLETIONS, {"presence_penalty": 2.0, "frequency_penalty": 1.0}),
    (CHAT, {"messages": [{"role": "system", "content": "a b"}, *QUESTION["messages"]]}),
    (CHAT, {**QUESTION, "tools": [{"type": "function", "function": {"name": "f"}}]}),
    (CHAT, {**QUESTION, "max_completion_tokens": 3}),
]


def test_an_adapter_alone_in_mlx_lms_server_answers_the_same(
    server: Server, tiny_base: Path, named_adapters: dict[str, Path]
) -> None:
    adapter = ("--adapter-path", named_adapters["dan"])
    theirs = Server("--model", tiny_base, *adapter).ready()
    try:
        for path, body in PARITY:
            body = {**PROMPT, **body}
            (ours, own), (status, other) = (
                server.ask({**body, "model": "dan"}, path),
                theirs.ask(body, path),
            )
            assert (ours, status) == (200, 200), body
            assert own["usage"]["completion_tokens"] > 0
            assert own["choices"][0].keys() == other["choices"][0].keys()
            assert without_rounding(own["choices"]) == without_rounding(
                other["choices"]
            ), body
    finally:
        theirs.stop()


def without_rounding(value: Any) -> Any:
    """The value with its numbers rounded."""
    if isinstance(value, dict):
        return {key: without_rounding(one) for key, one in value.items()}
    if isinstance(value, list):
        return [without_rounding(one) for one in value]
    return round(value, 3) if isinstance(value, float) else value


def test_a_client_that_leaves_a_stream_frees_its_place(server: Server) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    never = {"2": -1e5}  # the end of the text
    body = {"model": "cleo", "prompt": "fox", "max_tokens": 300, "logit_bias": never}

    def generated() -> int:
        counter = r'generated_tokens_total\{adapter="cleo"\} (\d+)'
        found = re.search(counter, server.get("/metrics")[1])
        return 0 if found is None else int(found[1])

    before = generated()
    connection.request("POST", COMPLETIONS, json.dumps({**body, "stream": True}))
    answer = connection.getresponse()
    answer.readline()
    answer.close()
    connection.close()
    for _ in range(500):
        if "requests_running 0" in server.get("/metrics")[1]:
            break
        time.sleep(0.01)
    assert 0 < generated() - before < 300


@pytest.mark.parametrize("body", DEADLY, ids=str)
def test_a_request_that_would_stop_the_server_is_refused(
    body: dict[str, Any], server: Server
) -> None:
    status, answer = server.ask({"max_tokens": 2, "model": "hal", **body})
    assert status == 400
    assert isinstance(answer["error"], str)
    assert server.ask({**PROMPT, "model": "hal"})[0] == 200


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"model": "zoe"}, 404, "'zoe' is not served; served are: "),
        ({"adapters": "../ada"}, 404, "is not served"),
        ({"model": "ada", "adapters": "bob"}, 400, "names two adapters"),
        ({"model": "ada", "max_tokens": 301}, 400, "at most 300"),
        ({"model": "ada", "n": 2}, 400, "n must be 1"),
        ({"model": "ada", "draft_model": "x"}, 400, "no draft model"),
        ({"model": "ada", "prompt": "fox " * 300}, 400, "--max-prompt-tokens"),
        ({"model": "ada", "prompt": "fox" * 9000}, 413, "20000 bytes"),
    ],
)
def test_a_request_beyond_the_limits_is_refused(
    body: dict[str, Any], status: int, message: str, server: Server
) -> None:
    answer = server.ask({**PROMPT, **body})
    assert answer[0] == status
    assert message in answer[1]["error"]


@pytest.mark.parametrize(
    "content", [b"[" * 10_000, b'{"prompt": "\xff"}', b"{'prompt'", b"[]", b"null", b""]
)
@pytest.mark.parametrize("path", [COMPLETIONS, LOAD, UNLOAD])
def test_a_body_other_than_an_object_is_refused(
    content: bytes, path: str, server: Server
) -> None:
    assert server.send(content, path)[0] == 400
    assert server.ask({**PROMPT, "model": "hal"})[0] == 200


@pytest.mark.parametrize(
    "path",
    [
        *("../cleo", "way-out", "/etc", "", ".", "ada/adapter_config.json", 5, None),
        *("a\0b", "hollow", "cut"),
    ],
)
def test_what_is_no_adapter_inside_the_root_is_not_loaded(
    path: Any, server: Server
) -> None:
    status, answer = server.ask({"lora_name": "new", "lora_path": path}, LOAD)
    assert status in (400, 404)
    assert isinstance(answer["error"], str)
    assert server.ask({**PROMPT, "model": "new"})[0] == 404


def test_adapters_are_loaded_replaced_and_unloaded(
    server: Server, root: Path, named: Any
) -> None:
    ada = {"lora_name": "new", "lora_path": "ada"}
    assert server.ask(ada, LOAD) == (200, {"status": "loaded new"})
    assert named.is_answer(chat(server, "new"), "ada")
    status, answer = server.ask(ada, LOAD)
    assert (status, "loaded already" in answer["error"]) == (400, True)

    aside = root.parent / "aside"
    (root / "ada").rename(aside)  # another adapter takes its place on disk
    shutil.copytree(root / "bob", root / "ada")
    try:
        assert named.is_answer(chat(server, "new"), "ada")
        assert server.ask({**ada, "load_inplace": True}, LOAD)[0] == 200
        assert named.is_answer(chat(server, "new"), "bob")
    finally:
        shutil.rmtree(root / "ada")
        aside.rename(root / "ada")

    assert server.ask({"lora_name": "new"}, UNLOAD)[0] == 200
    assert server.ask({**PROMPT, "model": "new"})[0] == 404
    assert server.ask({"lora_name": "new"}, UNLOAD)[0] == 404
    assert named.is_answer(chat(server, "ada"), "ada")


def test_a_request_finishes_with_the_adapter_that_it_started_with(
    server: Server, named: Any
) -> None:
    load = {"lora_name": "live", "lora_path": "ada", "load_inplace": True}
    assert server.ask(load, LOAD)[0] == 200
    body = {"model": "live", "prompt": "fox", "max_tokens": 300}
    body["logit_bias"] = {"2": -1e5}  # never the end of the text
    expected = server.text(**body)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(server.text, **body)
        time.sleep(0.1)
        assert server.ask({**load, "lora_path": "bob"}, LOAD)[0] == 200
        assert named.is_answer(chat(server, "live"), "bob")
        assert running.result() == expected
    assert server.ask({"lora_name": "live"}, UNLOAD)[0] == 200


def test_an_adapter_of_another_model_is_not_loaded(server: Server, root: Path) -> None:
    bad = root / "bad"
    shutil.copytree(root / "ada", bad)
    config = json.loads((bad / "adapter_config.json").read_text())
    config["mlx_dora"]["base"]["fingerprint"] = f"sha256:{'0' * 64}"
    (bad / "adapter_config.json").write_text(json.dumps(config))
    status, answer = server.ask({"lora_name": "bad", "lora_path": "bad"}, LOAD)
    assert (status, "it was trained on" in answer["error"]) == (400, True)
    assert server.ask({**PROMPT, "model": "ada"})[0] == 200


def test_metrics_have_the_format_of_prometheus(server: Server) -> None:
    server.text(model="fay", **PROMPT)
    status, text = server.get("/metrics")
    assert status == 200
    sample = re.compile(r'mlx_dora_\w+(\{(\w+="[^"]*",?)+\})? [-+.\deE]+')
    types: dict[str, str] = {}
    for line in text.splitlines():
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split()
            types[name] = kind
        elif not line.startswith("# HELP "):
            assert sample.fullmatch(line), line
    assert types["mlx_dora_request_seconds"] == "histogram"
    value = re.search(r'generated_tokens_total\{adapter="fay"\} (\d+)', text)
    assert value is not None
    assert int(value[1]) >= 4  # of this request
    assert 'mlx_dora_requests_total{adapter="fay",status="200"}' in text
    assert "mlx_dora_adapters_loaded 8" in text
    inf = re.search(r'request_seconds_bucket\{le="\+Inf"\} (\d+)', text)
    count = re.search(r"request_seconds_count (\d+)", text)
    assert inf is not None
    assert count is not None
    assert inf[1] == count[1]


def test_health_and_unknown_pages(server: Server) -> None:
    assert server.get("/health") == (200, '{"status": "ok"}')
    assert server.get("/nothing")[0] == 404
    assert server.ask({}, "/nothing")[0] == 404
