"""A headless Chromium, driven through its debugging pipe, and the fixture `browser`.

tab = browser.open(file, width=360, dark=True)
assert tab.problems == []  # console errors, exceptions, broken rules of the policy
assert tab.evaluate("document.title") == "..."
tab.screenshot(tmp_path / "page.png")
"""

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
MAC = "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"
PATIENCE = 60.0  # seconds for one answer


def find() -> str | None:
    """Return the program of a Chromium or Chrome, or None."""
    return next((path for name in (*NAMES, MAC) if (path := shutil.which(name))), None)


class Browser:
    """A running Chromium; `open` gives a fresh tab."""

    def __init__(self, program: str) -> None:
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        flags += ["--remote-debugging-pipe", f"--user-data-dir={self._folder.name}"]
        flags += ["--no-first-run", "--disable-dev-shm-usage", "about:blank"]
        # The protocol uses descriptors 3 and 4; dash cannot copy those above 9 to them.
        # MLX's libraries are not preloaded.
        start = f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}'
        self._process = subprocess.Popen(
            ["bash", "-c", start, program, *flags],
            pass_fds=(theirs_in, theirs_out),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={"PATH": os.environ["PATH"], "HOME": self._folder.name},
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._buffer, self._count = b"", 0
        self.events: list[dict[str, Any]] = []

    def send(self, method: str, session: str | None = None, **params: Any) -> Any:
        """Call a method of the DevTools protocol and return its result."""
        self._count += 1
        message: dict[str, Any] = {"id": self._count, "method": method}
        message |= {"params": params} | ({"sessionId": session} if session else {})
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._count:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            self.events.append(answer)

    def wait(self, method: str, session: str) -> None:
        """Wait for an event of a tab."""
        while not any(
            (e.get("method"), e.get("sessionId")) == (method, session)
            for e in self.events
        ):
            self.events.append(self._read())

    def _read(self) -> dict[str, Any]:
        end = time.monotonic() + PATIENCE
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._in], [], [], end - time.monotonic())
            data = os.read(self._in, 1 << 16) if ready else b""
            assert data, "Chromium does not answer"
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(line)

    def open(
        self,
        page: Path | str,
        *,
        width: int = 1200,
        height: int = 900,
        dark: bool = False,
        media: str = "",
    ) -> "Tab":
        """Open a file or an address and wait until it is loaded."""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        session = self.send("Target.attachToTarget", targetId=target, flatten=True)
        tab = Tab(self, session["sessionId"])
        for domain in ("Page", "Runtime", "Log", "Network"):
            tab.send(f"{domain}.enable")
        tab.resize(width, height)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        tab.send("Emulation.setEmulatedMedia", media=media, features=[scheme])
        tab.send("Page.navigate", url=page.as_uri() if isinstance(page, Path) else page)
        self.wait("Page.loadEventFired", tab.session)
        return tab

    def close(self) -> None:
        """End the browser."""
        with contextlib.suppress(OSError, AssertionError):
            self.send("Browser.close")
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._out)
        os.close(self._in)
        self._folder.cleanup()


class Tab:
    """A page in the browser."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser, self.session = browser, session

    def send(self, method: str, **params: Any) -> Any:
        """Call a method of the DevTools protocol for this tab."""
        return self._browser.send(method, self.session, **params)

    def _events(self, *methods: str) -> list[dict[str, Any]]:
        self.evaluate("0")  # collects what has happened
        return [
            event["params"]
            for event in self._browser.events
            if event.get("sessionId") == self.session and event["method"] in methods
        ]

    @property
    def problems(self) -> list[str]:
        """Console messages, exceptions and entries of the browser's log."""
        names = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown")
        return [json.dumps(e) for e in self._events(*names, "Log.entryAdded")]

    @property
    def requests(self) -> list[str]:
        """Addresses that the page asked for, without itself and inline data."""
        urls = [e["request"]["url"] for e in self._events("Network.requestWillBeSent")]
        return [url for url in urls[1:] if not url.startswith("data:")]

    def evaluate(self, expression: str) -> Any:
        """Return the value of a JavaScript expression; a promise is awaited."""
        answer = self.send(
            "Runtime.evaluate",
            expression=expression,
            returnByValue=True,
            awaitPromise=True,
            userGesture=True,
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def press(self, key: str) -> None:
        """Press and release a key, such as ``Tab``, ``Enter`` or ``ArrowRight``."""
        code = {"Tab": 9, "Enter": 13, "Escape": 27, "ArrowRight": 39}.get(key, 0)
        text = {"text": "\r"} if key == "Enter" else {}
        common = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        self.send("Input.dispatchKeyEvent", type="keyDown", **common, **text)
        self.send("Input.dispatchKeyEvent", type="keyUp", **common)

    def resize(self, width: int, height: int) -> None:
        """Set the size of the window in CSS pixels."""
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    def overflow(self) -> list[str]:
        """Return the elements that hang out of the window or of their card."""
        return self.evaluate(
            """[...document.querySelectorAll("main *")].filter(e => {
            if (e.closest("svg") && e.tagName !== "svg") return false;
            for (let p = e.parentElement; p.tagName !== "MAIN"; p = p.parentElement)
              if (getComputedStyle(p).overflowX !== "visible") return false;
            const box = e.getBoundingClientRect(), card = e.closest(".card");
            const right = card ? card.getBoundingClientRect().right : innerWidth;
            return box.width && (box.right > right + 1 || box.left < -1);
            }).map(e => e.outerHTML.slice(0, 120))"""
        )

    def screenshot(self, file: Path, *, whole: bool = True) -> None:
        """Save the page as PNG."""
        shot = self.send("Page.captureScreenshot", captureBeyondViewport=whole)
        file.write_bytes(base64.b64decode(shot["data"]))

    def pdf(self, file: Path) -> None:
        """Print the page."""
        printed = self.send("Page.printToPDF", printBackground=True)
        file.write_bytes(base64.b64decode(printed["data"]))


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Share a headless Chromium among tests; skip them where there is none."""
    program = find()
    if program is None:
        pytest.skip("no Chromium or Chrome here (Debian: apt-get install chromium)")
    browser = Browser(program)
    yield browser
    browser.close()
