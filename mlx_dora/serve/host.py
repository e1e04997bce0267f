"""mlx-lm's server, with requests checked before they reach its generation thread.

Import this module inside functions only: importing mlx_lm takes a second.
"""

import io
import json
import logging
import sys
import time
from collections.abc import Callable
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm import server

from mlx_dora.errors import DoRAError, printable
from mlx_dora.io.json import parse
from mlx_dora.serve.jobs import Kept
from mlx_dora.serve.paths import NotServedError, ServedPaths
from mlx_dora.serve.prompt_cache import PromptCache
from mlx_dora.serve.request import check_for_vocabulary, check_request
from mlx_dora.serve.threads import join

MAX_BYTES = 64 * 2**20
"""Maximum size of a request in bytes; images are part of the request."""

COMPLETIONS = ("/v1/completions", "/v1/chat/completions", "/chat/completions")


class Provider(server.ModelProvider):
    """Loads the model that a request names, if the server serves it."""

    def __init__(self, cli_args: Any, root: Path | None) -> None:
        super().__init__(cli_args)
        self.vocabulary = 0
        self.paths = ServedPaths(
            model=cli_args.model,
            adapter=cli_args.adapter_path,
            draft=cli_args.draft_model,
            root=root,
        )

    def load(
        self,
        model_path: str,
        adapter_path: str | None = None,
        draft_model_path: str | None = None,
    ) -> tuple[Any, Any]:
        """Load the model and adapter that a request names.

        mlx-lm's method ignores the adapter of a request that names no model.

        Raises:
            NotServedError: If the server does not serve them.
        """
        key = self.paths.choose(model_path, adapter_path, draft_model_path)
        if self.model_key != key:
            self._load(*key)
        return self.model, self.tokenizer

    def _load(
        self,
        model_path: str,
        adapter_path: str | None = None,
        draft_model_path: str | None = None,
    ) -> None:
        super()._load(model_path, adapter_path, draft_model_path)
        model: Any = self.model
        # MLX is lazy: the shape is known without computing anything.
        self.vocabulary = model(mx.array([[0]])).shape[-1]


class Generator(server.ResponseGenerator):
    """Generates in its own thread, and keeps the error that ended the thread."""

    model_provider: Provider
    failure: BaseException | None = None

    def _run_generate(self) -> None:
        with Kept(self._fail, BaseException):
            self._generate()

    def _fail(self, error: BaseException) -> None:
        logging.debug("the generation thread died", exc_info=error)
        self.failure, self._generation_failed = error, True

    def _tokenize(self, tokenizer: Any, request: Any, args: Any) -> Any:
        check_for_vocabulary(
            self.model_provider.vocabulary,
            logit_bias=args.logits.logit_bias,
            top_k=args.sampling.top_k,
            top_logprobs=args.top_logprobs,
        )
        for word in args.stop_words:
            if not tokenizer.encode(word, add_special_tokens=False):
                raise DoRAError(f"stop holds {word!r}, which has no tokens.")
        tokenized = super()._tokenize(tokenizer, request, args)
        if not tokenized[0]:
            raise DoRAError("the prompt has no tokens.")
        return tokenized

    def stop_and_join(self) -> None:
        """Stop generating, and wait for the thread to end."""
        super().stop_and_join()
        join(self._generation_thread)

    def raise_failure(self) -> None:
        """Raise the error that ended the thread, if any."""
        error = self.failure
        if isinstance(error, DoRAError | OSError):
            raise error
        if error is not None:
            text = printable(str(error), 300)
            raise DoRAError(
                f"the generation thread died of {type(error).__name__}: {text} "
                "(--log-level DEBUG shows where)."
            ) from error


class Handler(server.APIHandler):
    """Rejects an invalid request with an error before mlx-lm sees it."""

    response_generator: Generator
    max_bytes = MAX_BYTES
    _headers_buffer: list[bytes]  # headers not sent yet

    def do_POST(self) -> None:
        """Check the body of a request, then hand it to mlx-lm."""
        if self.path not in COMPLETIONS:
            super().do_POST()  # rejects the request
            return
        try:
            if (content := self.read_body()) is not None:
                self.answer(self.checked(parse(content, "the request")))
        except DoRAError as error:
            self.refuse(_status(error), str(error))

    def read_body(self) -> bytes | None:
        """Return the body of the request; None if its length was refused."""
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            negative = "Content-Length must not be negative."
            missing = "a request needs Content-Length, a number of bytes."
            is_negative = length.startswith("-")
            self.refuse(400 if length else 411, negative if is_negative else missing)
            return None
        if len(length) > 12 or int(length) > self.max_bytes:
            self.refuse(413, f"a request may have at most {self.max_bytes} bytes.")
            return None
        return self.rfile.read(int(length))

    def checked(self, body: Any) -> dict[str, Any]:
        """Return the body of a request for a completion, checked.

        Raises:
            DoRAError: If a value is invalid, or what it names is not served.
        """
        body = check_request(body, is_chat="chat" in self.path)
        self.response_generator.model_provider.paths.choose(
            body.get("model", "default_model"),
            body.get("adapters"),
            body.get("draft_model", "default_model"),
        )
        return body

    def answer(self, body: dict[str, Any]) -> None:
        """Let mlx-lm answer a checked request."""
        content = json.dumps(body).encode()
        self.headers.replace_header("Content-Length", str(len(content)))
        self.rfile = io.BytesIO(content)
        self._headers_buffer = []
        try:
            super().do_POST()
        except (
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:  # in generation
            if not self._headers_buffer:
                raise  # part of the answer has been sent
            self._headers_buffer.clear()
            is_alive = self.response_generator.generation_available()
            self.refuse(_status(error) if is_alive else 503, str(error))

    def refuse(self, status: int, message: str) -> None:
        """Answer with an error."""
        self._set_completion_headers(status)
        self.end_headers()
        self.wfile.write(json.dumps({"error": message}).encode())

    def _set_completion_headers(self, status_code: int = 200) -> None:
        error = sys.exc_info()[1]
        if status_code == 404 and error is not None:  # mlx-lm's status for any error
            status_code = _status(error)
            if not self.response_generator.generation_available():
                status_code = 503
        super()._set_completion_headers(status_code)


def _status(error: BaseException) -> int:
    return 404 if isinstance(error, NotServedError) else 400


def run(host: str, port: int, model_provider: Any, root: Path | None) -> None:
    """Serve until interrupted. Replaces mlx-lm's function of the same name.

    Raises:
        DoRAError: If the generation thread died.
        OSError: If the port cannot be opened.
    """
    cli_args = model_provider.cli_args
    generator = Generator(
        Provider(cli_args, root), PromptCache(cli_args.prompt_cache_size)
    )

    class Server(ThreadingHTTPServer):
        def service_actions(self) -> None:
            if generator.failure is not None:
                time.sleep(1.5)  # waiting clients receive an error first
                generator.raise_failure()

    if mx.distributed.init().rank() == 0:
        try:
            server._run_http_server(host, port, generator, Server, Handler)
        finally:
            generator.stop_and_join()
    else:
        generator.join()
    generator.raise_failure()


def main(root: Path | None) -> None:
    """Run mlx-lm's server command on ``sys.argv``.

    Args:
        root: Folder that holds the models and adapters that requests may name.
    """
    run_main(lambda host, port, provider: run(host, port, provider, root))


def run_main(run: Callable[[str, int, Any], None]) -> None:
    """Run mlx-lm's server command on ``sys.argv``, with another `run` of ours."""
    theirs = server.run
    server.run = run
    try:
        server.main()
    finally:
        server.run = theirs
