"""A Hugging Face Hub on loopback that accepts uploads."""

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread


class Hub(ThreadingHTTPServer):
    """Stores the files of every commit by path; refuses uploads if `is_closed`."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.files: dict[str, bytes] = {}
        self.created: list[str] = []
        self.is_closed = False

    @property
    def address(self) -> str:
        """The value for HF_ENDPOINT."""
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Answers(BaseHTTPRequestHandler):
    server: Hub  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.server.is_closed:
            self._answer(403, {"error": "you may not write here"})
        elif self.path == "/api/repos/create":
            name = "someone/" + json.loads(body)["name"]
            self.server.created.append(name)
            self._answer(200, {"url": f"{self.server.address}/{name}"})
        elif "/preupload/" in self.path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self._answer(200, {"files": files})
        elif "/commit/" in self.path:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    value = entry["value"]
                    content = base64.b64decode(value["content"])
                    self.server.files[value["path"]] = content
            name = "/".join(self.path.split("/")[3:5])
            url = f"{self.server.address}/{name}/commit/{'0' * 40}"
            commit = {"commitUrl": url, "commitOid": "0" * 40}
            self._answer(200, commit)
        else:
            self._answer(200, {})

    def do_GET(self) -> None:
        self._answer(200, {"siblings": [], "id": "someone/adapter", "sha": "0" * 40})

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self, status: int, content: object) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


@contextmanager
def serving() -> Iterator[Hub]:
    """Run a hub during the block."""
    hub = Hub()
    thread = Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
