"""The shell of a page in a real browser: tables, charts, keyboard, paper, policy."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from mlx_dora import __version__
from mlx_dora.page import provenance, render, render_page
from tests.browser import Browser, Tab

ATTACK = "\"'><img src=x onerror=\"document.title='PWNED'\">"
ROWS = [
    {"name": "layer 10", "value": 2.5},
    {"name": "layer 9", "value": None},
    {"name": 'a "b", c', "value": 10},
    {"name": "=1+1", "value": -3e-05},
]
SCRIPT = """
const scale = (w, o) => svg(w, 200, frame(w, 200, {range: [0, 3], title: "step",
  integer: true}, {range: [0, 0.0031], title: o || "ΔD"}).s + data.rows.map((r, i) =>
  marker(i, 100 + 40 * i, 90, 5, tip(r.name))).join(""), "points");
show(`<h1>${esc(data.name)}</h1><div class="grid">`
  + card("Chart", "A note.", chart("c", scale), true, choose("c", ["one", "two"]))
  + card("Table", "", table("t", [["name", r => r.name],
    ["value", r => r.value, v => v.toFixed(1), "a number"]], data.rows), true)
  + "</div>");
"""
NAMES = "[...document.querySelectorAll('#t tbody tr')].map(r => r.cells[0].textContent)"
TIP = "getComputedStyle(document.getElementById('tip')).display"


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """Return a page with a chart and a table."""
    data: dict[str, Any] = {"name": ATTACK, "rows": ROWS}
    data["provenance"] = provenance(["mlx_dora.x", "--data", "/home/jane/secret/chat"])
    script, file = tmp_path / "own.js", tmp_path / "page.html"
    script.write_text(SCRIPT, encoding="utf-8")
    file.write_text(render_page("A page", data, script), encoding="utf-8")
    return file


def click(tab: Tab, selector: str) -> None:
    tab.evaluate(f"document.querySelector({selector!r}).click()")


def test_a_page_has_no_problem_and_asks_for_nothing(browser: Browser, page: Path):
    tab = browser.open(page)
    assert (tab.problems, tab.requests) == ([], [])
    assert tab.evaluate("document.querySelectorAll('#c .mark').length") == len(ROWS)


def test_a_heading_sorts_by_click_and_by_key(browser: Browser, page: Path):
    tab = browser.open(page)
    assert tab.evaluate(NAMES) == [row["name"] for row in ROWS]
    click(tab, "[data-sort='t:1']")
    largest = ['a "b", c', "layer 10", "=1+1", "layer 9"]  # an empty value comes last
    assert tab.evaluate(NAMES) == largest
    assert tab.evaluate("document.querySelectorAll('th')[1].ariaSort") == "descending"
    tab.evaluate("document.querySelector('[data-sort]').focus()")
    tab.press("Enter")
    ascending = ["=1+1", 'a "b", c', "layer 9", "layer 10"]  # 9 before 10
    assert tab.evaluate(NAMES) == ascending
    assert tab.evaluate("document.querySelectorAll('th')[1].ariaSort") == "none"
    tab.press("Tab")
    tab.press("Enter")
    tab.press("Enter")
    assert tab.evaluate(NAMES) == ["=1+1", "layer 10", 'a "b", c', "layer 9"]
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    assert tab.evaluate(outline) == "solid"


def test_the_columns_are_explained(browser: Browser, page: Path):
    tab = browser.open(page)
    explained = tab.evaluate("document.querySelector('details').textContent")
    assert explained == "What the columns meanvalue: a number"


def test_a_filter_keeps_rows_with_all_words(browser: Browser, page: Path):
    tab = browser.open(page)
    tab.evaluate("document.querySelector('[data-filter]').focus()")
    tab.send("Input.insertText", text="LAYER 1")
    assert tab.evaluate(NAMES) == ["layer 10"]
    count = tab.evaluate("document.getElementById('t-count').textContent")
    assert count == "1 of 4 rows"


def test_a_long_table_draws_its_first_rows_and_copies_all(browser: Browser, page: Path):
    tab = browser.open(page)
    tab.evaluate("delete tables.t; delete charts.c")
    tab.evaluate("show(table('big', [['n', r => r]], [...Array(2500).keys()]))")
    assert tab.evaluate("document.querySelectorAll('#big tbody tr').length") == 2000
    count = tab.evaluate("document.getElementById('big-count').textContent")
    assert count == "2,500 rows, the first 2,000 shown"
    assert tab.evaluate("csv('big')").count("\n") == 2501


def test_csv_holds_full_numbers_and_no_formula(browser: Browser, page: Path):
    tab = browser.open(page)
    assert tab.evaluate("csv('t')") == (
        'name,value\nlayer 10,2.5\nlayer 9,\n"a ""b"", c",10\n"\'=1+1",-0.00003\n'
    )
    tab.send("Emulation.setFocusEmulationEnabled", enabled=True)
    tab.evaluate("copy(document.querySelector('[data-copy]'))")
    label = "document.querySelector('[data-copy]').textContent"
    assert tab.evaluate(label) == "Copied"


def test_arrow_keys_read_the_values_of_a_chart(browser: Browser, page: Path):
    tab = browser.open(page)
    assert tab.evaluate(TIP) == "none"
    tab.evaluate("document.querySelector('#c svg').focus()")
    tab.press("ArrowRight")
    tab.press("ArrowRight")
    shown = "document.getElementById('tip').textContent"
    assert (tab.evaluate(TIP), tab.evaluate(shown)) == ("block", "layer 9")
    tab.press("Escape")
    assert tab.evaluate(TIP) == "none"
    label = tab.evaluate("document.querySelector('#c svg').ariaLabel")
    assert label.startswith("points.")


def test_titles_of_axes_stand_apart_from_the_numbers(browser: Browser, page: Path):
    tab = browser.open(page)
    boxes = tab.evaluate(
        """[...document.querySelectorAll('#c text')].map(t => {
        const b = t.getBoundingClientRect();
        return [t.textContent, b.left, b.right, b.top, b.bottom]; })"""
    )
    texts = [box[0] for box in boxes]
    assert {"0", "1", "2", "3", "step", "one (×10⁻³)"} <= {*texts}
    assert "1.00" not in texts  # a step is a whole number
    for i, (_, left, right, top, bottom) in enumerate(boxes):
        for _, left2, right2, top2, bottom2 in boxes[i + 1 :]:
            apart = right <= left2 or right2 <= left or bottom <= top2 or bottom2 <= top
            assert apart, (boxes[i], boxes)


def test_a_choice_redraws_its_chart(browser: Browser, page: Path):
    tab = browser.open(page)
    tab.evaluate(
        "const s = document.querySelector('select'); s.value = 'two'; s.onchange()"
    )
    assert "two" in tab.evaluate("document.getElementById('c').textContent")


@pytest.mark.parametrize("media", ["", "print"])
def test_dark_mode_is_for_screens(browser: Browser, page: Path, media: str):
    tab = browser.open(page, dark=True, media=media)
    color = tab.evaluate("getComputedStyle(document.querySelector('.card')).background")
    light = tab.evaluate("getComputedStyle(document.documentElement).colorScheme")
    assert (light == "light") == (media == "print")
    assert ("rgb(255, 255, 255)" in color) == (media == "print")


def test_an_open_tooltip_is_not_printed(browser: Browser, page: Path, tmp_path: Path):
    tab = browser.open(page)
    tab.evaluate("document.querySelector('#c svg').focus()")
    tab.press("ArrowRight")
    tab.send("Emulation.setEmulatedMedia", media="print")
    assert tab.evaluate(TIP) == "none"
    tools = "getComputedStyle(document.querySelector('.tools')).display"
    assert tab.evaluate(tools) == "none"
    tab.pdf(tmp_path / "page.pdf")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")


def test_a_page_names_its_version_and_command_without_folders(
    browser: Browser, page: Path
):
    text = browser.open(page).evaluate("document.querySelector('footer').textContent")
    assert f"mlx_dora {__version__}" in text
    assert "mlx_dora.x --data chat" in text
    assert re.search(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", text)
    assert "secret" not in page.read_text(encoding="utf-8")


def test_names_are_text(browser: Browser, page: Path):
    tab = browser.open(page)
    assert tab.evaluate("document.querySelector('h1').textContent") == ATTACK
    assert tab.evaluate("document.images.length") == 0


def test_the_policy_stops_a_script_that_escaping_missed(
    browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    broken = tmp_path / "shell"
    shutil.copytree(Path(render.__file__).parent, broken)
    source = (broken / "page.js").read_text("utf-8")
    escaping = re.search(r"const esc = .*\n", source)
    assert escaping is not None
    source = source.replace(escaping[0], "const esc = t => String(t);\n")
    (broken / "page.js").write_text(source, encoding="utf-8")
    monkeypatch.setattr(render, "_HERE", broken)
    script, file = tmp_path / "own.js", tmp_path / "page.html"
    script.write_text("show(esc(data.name));", encoding="utf-8")
    text = render_page("A page", {"name": ATTACK}, script)
    file.write_text(text, encoding="utf-8")
    tab = browser.open(file)
    assert tab.evaluate("document.images.length") == 1  # so the markup was inserted
    assert tab.evaluate("document.title") == "A page"
    assert any("Content Security Policy" in line for line in tab.problems)


def test_a_broken_page_is_noticed(browser: Browser, tmp_path: Path):
    file = tmp_path / "page.html"
    file.write_text("<script>nothing.there()</script>", encoding="utf-8")
    assert "nothing is not defined" in browser.open(file).problems[0]
