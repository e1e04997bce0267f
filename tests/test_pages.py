"""The pages of the documentation: every link leads somewhere, every page is listed."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from mlx_dora.analyze.table import ANALYSIS_LEGEND, COMPARISON_LEGEND

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


def test_the_glossary_has_every_word_of_the_tables_legends() -> None:
    text = (ROOT / "docs" / "concepts" / "glossary.md").read_text(encoding="utf-8")
    words = set(
        re.split(r", | \(|\)", ", ".join(re.findall(r"^\| (.+?) \|", text, re.M)))
    )
    legend = " ".join([*ANALYSIS_LEGEND, *COMPARISON_LEGEND])
    explained = re.findall(r"([\wΔ]+(?:, \w+| and \w+)?): ", legend)
    named = {word for each in explained for word in re.split(", | and ", each)}
    assert {"ΔM", "reads", "disturbance", "kind", "Pearson"} <= named
    assert named - words <= {"rel", "angle"}  # in the line of ΔM; a plain word


def test_the_readme_leads_to_the_index() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "](docs/README.md)" in text


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_drawing_of_the_packages_is_up_to_date() -> None:
    drawing = ROOT / "docs" / "assets" / "house.svg"
    drawn = script("_draw_house").draw()
    assert drawn == drawing.read_text(encoding="utf-8"), "python docs/_draw_house.py"


@pytest.mark.parametrize("name", ["grpo.svg", "preferences.svg"])
def test_the_curves_are_those_of_the_stored_results(name: str) -> None:
    drawing = ROOT / "docs" / "assets" / name
    drawn = script("_draw_curves").DRAWINGS[name]()
    assert drawn == drawing.read_text(encoding="utf-8"), "python docs/_draw_curves.py"


def test_the_link_checker_finds_what_leads_nowhere(tmp_path: Path) -> None:
    (tmp_path / "b.html").write_text('<h1 id="here">b</h1>')
    (tmp_path / "a.html").write_text(
        '<a href="b.html#here">good</a><a href="b.html#there">bad</a>'
        '<a href="c.html">bad</a><a href="https://example.com">not followed</a>'
        '<script src="https://example.com/x.js"></script>'
    )
    assert script("_check_links").problems(tmp_path) == [
        "a.html: b.html#there has no such anchor",
        "a.html: c.html leads nowhere",
        "a.html: loads https://example.com/x.js",
    ]
