"""The HTTP side of the server of several adapters.

Import this module inside functions only: importing mlx_lm takes a second.
"""

import json
import logging
import signal
import sys
import time
from collections.abc import Callable
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm import server

from mlx_dora.errors import DoRAError
from mlx_dora.io.json import parse
from mlx_dora.serve.batch import BatchServer
from mlx_dora.serve.config import ServeConfig, check_name
from mlx_dora.serve.desk import BusyError, Desk, StoppingError
from mlx_dora.serve.host import COMPLETIONS, Handler, Provider, run_main
from mlx_dora.serve.metrics import CONTENT_TYPE, Metrics
from mlx_dora.serve.paths import DEFAULT, NotServedError, folder_inside
from mlx_dora.serve.prompt_cache import PromptCache
from mlx_dora.serve.registry import Registry
from mlx_dora.serve.request import check_limits, check_request

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
_STATUS = {NotServedError: 404, BusyError: 429, StoppingError: 503}


class AdapterHandler(Handler):
    """Answers requests to a server of several adapters."""

    response_generator: BatchServer  # pyright: ignore[reportIncompatibleVariableOverride]
    desk: Desk
    timeout = 60  # seconds for which a client may keep us waiting
    status = 0

    @property
    def registry(self) -> Registry:
        """The served names."""
        return self.response_generator.registry

    @property
    def config(self) -> ServeConfig:
        """The server's options."""
        return self.response_generator.config

    @property
    def max_bytes(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Maximum size of a request in bytes."""
        return self.config.max_body

    def do_GET(self) -> None:
        """Answer ``/health``, ``/metrics`` and ``/v1/models``."""
        path = self.path.partition("?")[0]
        if path == "/metrics":
            text = self.response_generator.metrics.render()
            self._send(200, text.encode(), CONTENT_TYPE)
        elif path == "/health":
            state = self._health()
            self._send_json(200 if state == "ok" else 503, {"status": state})
        elif path.rstrip("/") == "/v1/models":
            self._send_json(200, {"object": "list", "data": self._models()})
        elif path.startswith("/v1/models/"):
            name = path.removeprefix("/v1/models/")
            matches = [model for model in self._models() if model["id"] == name]
            if matches:
                self._send_json(200, matches[0])
            else:
                self.refuse(404, f"{name!r:.200} is not served.")
        else:
            self.refuse(404, "there is no such page.")

    def do_POST(self) -> None:
        """Answer a completion, or load or unload an adapter."""
        if self.path not in (*COMPLETIONS, LOAD, UNLOAD):
            self.refuse(404, "there is no such page.")
            return
        started = time.monotonic()
        self.name = ""
        try:
            if (content := self.read_body()) is not None:
                with self.desk.admit():
                    self._answer_body(parse(content, "the request"))
        except DoRAError as error:
            self.refuse(_STATUS.get(type(error), 400), str(error))
        finally:
            if self.path in COMPLETIONS:
                metrics = self.response_generator.metrics
                metrics.count(
                    "requests_total", adapter=self.name, status=str(self.status)
                )
                metrics.observe("request_seconds", time.monotonic() - started)

    def _answer_body(self, body: Any) -> None:
        self._started = time.monotonic()
        self.response_generator.wait()
        if self.path in COMPLETIONS:
            self.answer(self.checked(body))
            return
        if not isinstance(body, dict):
            raise DoRAError("the request must be a JSON object.")
        name = check_name(body.get("lora_name"))
        if self.path == UNLOAD:
            self.response_generator.unload_adapter(name)
            self._send_json(200, {"status": f"unloaded {name}"})
            return
        replace = body.get("load_inplace", False)
        if not isinstance(replace, bool):
            raise DoRAError("load_inplace must be true or false.")
        folder = self._folder(name, body.get("lora_path"))
        self.response_generator.load_adapter(name, folder, replace=replace)
        self._send_json(200, {"status": f"loaded {name}"})

    def _folder(self, name: str, path: Any) -> Path:
        """Return the folder of an adapter to load: of the command line or the root."""
        if not isinstance(path, str) or not path:
            raise DoRAError("lora_path must be text: the adapter's folder.")
        for known, folder in self.config.folders().items():
            if known == name and path in (str(folder), name):
                return folder
        root = self.config.root()
        if root is not None and (inside := folder_inside(root, path)) is not None:
            return inside
        raise NotServedError(
            f"{path!r:.200} is not served: it is neither the folder that --adapter "
            "gives this name, nor a folder inside --adapter-root."
        )

    def checked(self, body: Any) -> dict[str, Any]:
        """Return the body of a request for a completion, checked."""
        body = check_request(body, is_chat="chat" in self.path)
        check_limits(body, self.config.max_new_tokens)
        served = self.registry.choose(body.get("model", DEFAULT), body.get("adapters"))
        self.name = served.name
        if "max_completion_tokens" not in body:
            usual = self.response_generator.cli_args.max_tokens
            body.setdefault("max_tokens", min(usual, self.config.max_new_tokens))
        return body

    def _health(self) -> str:
        if not self.response_generator.generation_available():
            return "unavailable"
        if self.desk.is_stopping:
            return "stopping"
        return "ok" if self.response_generator.ready.is_set() else "loading"

    def _models(self) -> list[dict[str, Any]]:
        base = self.registry.base_names[0]
        common = {"object": "model", "created": self.created, "owned_by": "mlx_dora"}
        return [
            {"id": base, **common},
            *({"id": name, **common, "parent": base} for name in self.registry.names),
        ]

    def refuse(self, status: int, message: str) -> None:
        """Answer with an error."""
        self._send_json(status, {"error": message})

    def _send_json(self, status: int, value: Any) -> None:
        self._send(status, json.dumps(value).encode(), "application/json")

    def _send(self, status: int, content: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        if status in (429, 503):
            self.send_header("Retry-After", "1")
        self._set_cors_headers()
        self.end_headers()
        self.wfile.write(content)

    def generate_response(self, *args: Any, **kwargs: Any) -> dict:
        """Return mlx-lm's answer, and note when the first one is made."""
        if self._started is not None:
            seconds = time.monotonic() - self._started
            self.response_generator.metrics.observe("first_token_seconds", seconds)
            self._started = None
        return super().generate_response(*args, **kwargs)

    _started: float | None = None

    def send_response(self, code: int, message: str | None = None) -> None:
        """Note the status of the answer."""
        self.status = int(code)
        super().send_response(code, message)

    def log_message(self, format: str, *args: Any) -> None:
        """Log a request."""
        logging.info("%s %s", self.address_string(), format % args)


def run(host: str, port: int, provider: Any, config: ServeConfig) -> None:
    """Serve several adapters until a signal; replaces mlx-lm's function `run`.

    Raises:
        DoRAError: If an adapter does not fit, the generation thread died, or requests
            were cut off at the end.
        OSError: If the port cannot be opened.
    """
    args = provider.cli_args
    _check_host_options(args)
    desk = Desk(args.decode_concurrency + config.max_queue)
    generator = _generator(args, config, desk)

    class Server(ThreadingHTTPServer):
        request_queue_size = 512  # connections that wait to be accepted

        def service_actions(self) -> None:
            if generator.failure is not None:
                time.sleep(1.5)  # waiting clients receive an error first
                generator.raise_failure()
            if desk.may_end():
                raise _DoneError

        def handle_error(self, request: Any, client_address: Any) -> None:
            error = sys.exc_info()[1]
            if isinstance(error, ConnectionError | TimeoutError):
                logging.info("%s left: %s", client_address[0], error)
            else:
                super().handle_error(request, client_address)

    kind = type("Handler", (AdapterHandler,), {"desk": desk})
    before = _drain_on_signals(lambda: desk.stop(config.drain_seconds))
    try:
        server._run_http_server(host, port, generator, Server, kind)  # pyright: ignore[reportArgumentType]
    except _DoneError:
        logging.info("all requests are answered; stopping.")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        generator.stop_and_join()
    generator.raise_failure()


class _DoneError(Exception):
    """Raised when a stopping server has answered all requests."""


def _generator(args: Any, config: ServeConfig, desk: Desk) -> BatchServer:
    names = dict.fromkeys([args.model, str(Path(args.model).resolve())])
    registry = Registry(list(names))
    cache = PromptCache(args.prompt_cache_size)
    gauges: dict[tuple[str, str], Callable[[], float]] = {
        ("requests_admitted", "Requests that run or wait."): lambda: desk.admitted,
        ("requests_running", "Rows of the batch, those in prefill included."): lambda: (
            len(generator.running)
        ),
        ("adapters_loaded", "Loaded adapters."): lambda: len(registry.names),
        ("prompt_cache_bytes", "Bytes of cached prompts."): lambda: cache.nbytes,
        ("memory_bytes", "Bytes that MLX uses."): mx.get_active_memory,
    }
    generator = BatchServer(
        Provider(args, None), cache, registry, config, Metrics(gauges)
    )
    return generator


def _check_host_options(args: Any) -> None:
    """Refuse mlx-lm's options that several adapters cannot use."""
    if not args.model:
        raise DoRAError("--adapter needs --model, the base of the adapters.")
    given = {
        "--adapter-path": args.adapter_path,
        "--draft-model": args.draft_model,
        "--kv-bits": args.kv_bits,
        "--pipeline": args.pipeline,
    }
    wrong = [name for name, value in given.items() if value]
    if wrong or mx.distributed.init().size() > 1:
        what = " and ".join(wrong) or "several machines"
        raise DoRAError(f"{what} cannot be combined with --adapter.")


def _drain_on_signals(stop: Callable[[], None]) -> dict[int, Any]:
    """Stop gracefully at SIGTERM and Ctrl-C, and at once at the second signal."""
    numbers = (int(signal.SIGTERM), int(signal.SIGINT))
    before: dict[int, Any] = {n: signal.getsignal(n) for n in numbers}

    def handle(number: int, _frame: Any) -> None:
        for each, handler in before.items():
            signal.signal(each, handler)
        logging.info("stopping; running requests may finish.")
        stop()

    for number in before:
        signal.signal(number, handle)
    return before


def main(config: ServeConfig) -> None:
    """Run mlx-lm's server command on ``sys.argv``, with several adapters."""
    run_main(lambda host, port, provider: run(host, port, provider, config))
