"""Figures of the pages: each has a mark, and each mark a command, date and machine."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "docs" / "figures.md"
PAGES = sorted(
    path
    for path in [
        ROOT / "README.md",
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("metal/*.md"),
    ]
    if path != TABLE and path.name != "cli.md"
)
MARK = re.compile(r"\[F(\d+)\]\((?:[\w./]*figures\.md)#f(\d+)\)")
ROW = re.compile(r'\| <a id="f(\d+)"></a>F(\d+) \|(.*)\|$', re.M)
MEASURED = re.compile(
    r"\d ?(?:ms|MB|GB|GFLOP/s|tokens/s|%|×)(?![\w-]| \d)|±|\| [+-]?\d*\.\d+ "
)
NOT_MEASURED = {  # sections whose figures are settings, sizes or limits
    "README.md": {"mlx_dora"},
    "docs/analysis.md": {"What is measured", "What the numbers suggest"},
    "docs/fuse.md": {"A quantized base", "Adapters of earlier mlx-lm"},
    "docs/memory.md": {"Before memory ends"},
    "docs/merging.md": {"Magnitude and direction apart"},
    "docs/method.md": {"Fuse"},
    "docs/studies/when.md": {"What counts"},
    "docs/training.md": {"Against mlx-lm's trainer"},
}


def sections(page: Path) -> dict[str, str]:
    """Text by heading, without code."""
    text = page.read_text(encoding="utf-8")
    text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    parts = re.split(r"^#+ (.+)$", text, flags=re.M)
    return {
        title: re.sub(r"`[^`]*`|^    .*$", "", body, flags=re.M)
        for title, body in zip(parts[1::2], parts[2::2], strict=True)
    }


def rows() -> dict[str, list[str]]:
    """The cells of each row of the table, by number."""
    found: dict[str, list[str]] = {}
    for anchor, number, rest in ROW.findall(TABLE.read_text(encoding="utf-8")):
        assert anchor == number
        assert number not in found, f"F{number} stands twice"
        found[number] = [cell.strip() for cell in rest.split(" | ")]
    return found


def marks(page: Path) -> list[tuple[str, str]]:
    return MARK.findall(page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_marks_of_a_page_lead_to_a_row(page: Path) -> None:
    known = rows()
    for shown, anchor in marks(page):
        assert shown == anchor
        assert shown in known, f"F{shown}"


def test_every_row_has_a_command_a_date_and_a_machine() -> None:
    for number, cells in rows().items():
        figure, command, date, machine, again = cells
        assert figure, number
        assert "`" in command or "commands of each page" in command, number
        assert re.fullmatch(r"20\d\d-\d\d-\d\d", date), number
        assert machine, number
        assert re.match(r"yes|no: |by ", again), number


def test_every_row_is_the_source_of_a_figure() -> None:
    used = {shown for page in PAGES for shown, _ in marks(page)}
    assert rows().keys() == used


def test_scripts_of_the_table_exist() -> None:
    text = TABLE.read_text(encoding="utf-8")
    names = set(re.findall(r"\bB/(\w+\.py)", text))
    assert len(names) > 10
    for name in names:
        assert (ROOT / "benchmarks" / name).is_file(), name


def test_the_rows_marked_again_are_those_of_the_script() -> None:
    source = (ROOT / "benchmarks" / "figures.py").read_text(encoding="utf-8")
    (table,) = (
        node.value
        for node in ast.parse(source).body
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "CHEAP"
    )
    assert isinstance(table, ast.Dict)
    names = {ast.literal_eval(key) for key in table.keys if key}
    again = {f"F{n}" for n, cells in rows().items() if cells[-1].startswith("yes")}
    assert names == again


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_measured_figures_have_a_mark_in_their_section(page: Path) -> None:
    exempt = NOT_MEASURED.get(page.relative_to(ROOT).as_posix(), set())
    for title, body in sections(page).items():
        if title not in exempt and (figure := MEASURED.search(body)):
            assert MARK.search(body), f"{title}: {figure[0]}"
