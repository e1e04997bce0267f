"""Hooks of the site's build (mkdocs.yml): pages and links outside of `docs/`."""

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

DOCS = Path(__file__).parent
ROOT = DOCS.parent
BORROWED = {
    "changelog.md": ROOT / "CHANGELOG.md",
    "contributing.md": ROOT / "CONTRIBUTING.md",
    "kernels.md": ROOT / "metal" / "README.md",
}
"""Pages of the site whose source is elsewhere in the repository."""
VERIFIED, SECTION = "not-verified.md", "What has not been verified"
"""The page of a section of the README."""
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the borrowed pages."""
    for name, source in BORROWED.items():
        files.append(File.generated(config, name, abs_src_path=str(source)))
    readme = (ROOT / "README.md").read_text()
    section = readme.split(f"\n## {SECTION}\n")[1].split("\n## ")[0]
    files.append(File.generated(config, VERIFIED, content=f"# {SECTION}\n{section}"))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point every link to the place where its target is on the site."""
    name = page.file.src_uri
    here = ROOT if name == VERIFIED else BORROWED.get(name, DOCS / name).parent
    pages = {source: DOCS / target for target, source in BORROWED.items()}

    def point(match: re.Match[str]) -> str:
        text, link, anchor = match[1], match[2], match[3] or ""
        if link.startswith(("http:", "https:", "mailto:")):
            return match[0]
        target = (here / link).resolve()
        target = pages.get(target, target)
        if (
            target == ROOT / "README.md"
            and anchor == f"#{SECTION.lower().replace(' ', '-')}"
        ):
            target, anchor = DOCS / VERIFIED, ""
        if target.is_relative_to(DOCS):
            inside = os.path.relpath(target, (DOCS / name).parent)
            return f"[{text}]({Path(inside).as_posix()}{anchor})"
        if config.repo_url:  # known where the site is published
            path = target.relative_to(ROOT).as_posix()
            return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{path}{anchor})"
        return text

    return LINK.sub(point, markdown)
