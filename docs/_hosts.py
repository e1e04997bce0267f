"""Writes the table of tested hosts into docs/hosts.md and README.md.

    MLX_DORA_HOSTS=docs/hosts.json pytest -n 0 -m "slow or not slow" TESTS
    python docs/_hosts.py

The tests record what they ran (`tests/hosts.py`); this script only formats it.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
RECORDS = ROOT / "docs" / "hosts.json"
PAGES = (ROOT / "docs" / "hosts.md", ROOT / "README.md")
START, END = "<!-- hosts: python docs/_hosts.py -->", "<!-- end of hosts -->"


def table(records: dict[str, dict[str, dict[str, str]]]) -> str:
    """Return the table, a row for each host."""
    lines = ["| host | version | what was run | date |", "| --- | --- | --- | --- |"]
    for host, found in sorted(records.items(), key=lambda item: item[0].lower()):
        versions = dict.fromkeys(entry["version"] for entry in found.values())
        dates = sorted({entry["date"] for entry in found.values()})
        what = "; ".join(sorted(found))
        lines.append(f"| {host} | {', '.join(versions)} | {what} | {dates[-1]} |")
    return "\n".join(lines)


def with_table(page: str, made: str) -> str:
    """Return a page with this table between its marks."""
    before, rest = page.split(START)
    _, after = rest.split(END)
    return f"{before}{START}\n\n{made}\n\n{END}{after}"


def main() -> int:
    """Write the pages; with ``--check``, only say whether they would change."""
    made = table(json.loads(RECORDS.read_text(encoding="utf-8")))
    for path in PAGES:
        old = path.read_text(encoding="utf-8")
        new = with_table(old, made)
        if new != old and "--check" in sys.argv:
            return 1
        path.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
