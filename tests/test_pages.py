"""The pages of the documentation: every link leads somewhere, every page is listed."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("metal/*.md")]
)


def anchors(page: Path) -> set[str]:
    """The anchors of a page: its own, and those that GitHub gives to headings."""
    text = page.read_text(encoding="utf-8")
    titles = re.findall(r"^#+ (.+)$", text, re.M)
    kept = (re.sub(r"[^\w\- ]", "", title.lower()) for title in titles)
    named = re.findall(r'<a id="(\w+)">', text)
    return {title.replace(" ", "-") for title in kept} | set(named)


@pytest.mark.parametrize(
    "page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix()
)
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    for link in (link for link in links if not link.startswith("http")):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_index_lists_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"\]\((\w+\.md)\)", index))
    assert listed == {path.name for path in ROOT.glob("docs/*.md")} - {"README.md"}


def test_the_readme_leads_to_the_index() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "](docs/README.md)" in text


def test_the_drawing_of_the_packages_is_up_to_date() -> None:
    script = ROOT / "docs" / "_draw_house.py"
    spec = importlib.util.spec_from_file_location("_draw_house", script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    drawing = ROOT / "docs" / "assets" / "house.svg"
    assert module.draw() == drawing.read_text(encoding="utf-8"), f"run python {script}"
