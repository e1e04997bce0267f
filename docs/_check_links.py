"""Check the built site: every link, image and anchor leads somewhere in it.

    mkdocs build --strict && python docs/_check_links.py [build/site]

Also fails if a page loads a script, style, font or picture from another host. Links to
other hosts are counted and not followed.
"""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADED = {"script": "src", "link": "href", "img": "src", "iframe": "src"}
HARMLESS = {"canonical", "edit", "prev", "next"}  # links that load nothing


class Page(HTMLParser):
    """The anchors, links and loaded files of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what an element names and what it refers to."""
        have = {name: value or "" for name, value in attrs}
        self.anchors |= {have[name] for name in ("id", "name") if name in have}
        if tag == "a" and "href" in have:
            self.links.append(have["href"])
        if (name := LOADED.get(tag)) in have and have.get("rel") not in HARMLESS:
            self.loaded.append(have[name or ""])


def problems(site: Path) -> list[str]:
    """Return a line for each broken link of a site."""
    pages = {
        path.resolve(): Page(path.read_text(encoding="utf-8"))
        for path in sorted(site.rglob("*.html"))
        if path.name != "404.html"  # its links start at the root of a server
    }
    found = []
    for path, page in pages.items():
        name = path.relative_to(site.resolve())
        for link in [*page.links, *page.loaded]:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                if link in page.loaded:
                    found.append(f"{name}: loads {link}")
                continue
            target = (path.parent / unquote(parts.path)).resolve()
            target = path if not parts.path else target
            if target.is_dir():
                target /= "index.html"
            if not target.is_file():
                found.append(f"{name}: {link} leads nowhere")
                continue
            anchors = pages[target].anchors if target in pages else set()
            if parts.fragment and unquote(parts.fragment) not in anchors:
                found.append(f"{name}: {link} has no such anchor")
    for style in site.rglob("*.css"):
        text = style.read_text(encoding="utf-8")
        for url in re.findall(r"url\(['\"]?(https?:[^)'\"]+)", text):
            found.append(f"{style.relative_to(site)}: loads {url}")
    print(f"{len(pages)} pages, {sum(len(p.links) for p in pages.values())} links")
    return found


if __name__ == "__main__":
    site = Path(sys.argv[1] if len(sys.argv) > 1 else "build/site")
    broken = problems(site)
    print("\n".join(broken))
    sys.exit(1 if broken or not site.is_dir() else 0)
