"""The built site in a real browser: wide, narrow, light and dark."""

import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from tests.browser import Browser

ROOT = Path(__file__).parents[1]
PAGES = ("index", "tutorials/first-adapter", "training", "architecture", "cli")


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def site(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Build the site and serve it; return its address."""
    pytest.importorskip("material", reason="the site's tools come with the extra docs")
    folder = tmp_path_factory.mktemp("site")
    subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "-d", folder],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        check=True,
    )
    handler = partial(Quiet, directory=str(folder))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("page", PAGES)
def test_a_page_works_without_another_host(
    browser: Browser, site: str, page: str
) -> None:
    tab = browser.open(f"{site}/{page}.html", width=1300)
    assert tab.problems == []
    assert tab.requests
    assert [url for url in tab.requests if not url.startswith(site)] == []
    assert tab.evaluate("document.querySelector('h1').offsetHeight") > 0
    broken = "[...document.images].filter(i => !i.naturalWidth).map(i => i.src)"
    assert tab.evaluate(broken) == []


@pytest.mark.parametrize("page", PAGES)
def test_a_page_fits_a_telephone(browser: Browser, site: str, page: str) -> None:
    tab = browser.open(f"{site}/{page}.html", width=360, height=780)
    assert tab.evaluate("document.documentElement.scrollWidth") == 360


def test_the_colors_follow_the_readers_system_at_every_visit(
    browser: Browser, site: str
) -> None:
    for dark in (False, True, False, True):
        tab = browser.open(f"{site}/index.html", dark=dark)
        scheme = tab.evaluate("document.body.dataset.mdColorScheme")
        assert scheme == ("slate" if dark else "default")


def test_what_was_not_verified_is_a_page(browser: Browser, site: str) -> None:
    tab = browser.open(f"{site}/index.html")
    links = "[...document.querySelectorAll('article a')].map(a => a.href)"
    assert f"{site}/not-verified.html" in tab.evaluate(links)
    page = browser.open(f"{site}/not-verified.html")
    text = page.evaluate("document.querySelector('article').textContent")
    assert "never run any of this on a Mac" in text
    assert f"{site}/gpu.html" in page.evaluate(links)
