"""The table of tested hosts is that of the recorded test results."""

import datetime
import json
import re
from pathlib import Path

import pytest

from tests.hosts import VARIABLE, ran
from tests.test_pages import script

ROOT = Path(__file__).parent.parent
RECORDS = ROOT / "docs" / "hosts.json"


@pytest.mark.parametrize("page", ["docs/hosts.md", "README.md"])
def test_the_table_of_a_page_is_that_of_the_records(page: str) -> None:
    hosts = script("_hosts")
    text = (ROOT / page).read_text(encoding="utf-8")
    made = hosts.table(json.loads(RECORDS.read_text(encoding="utf-8")))
    assert hosts.with_table(text, made) == text, "python docs/_hosts.py"


def test_every_record_comes_from_a_test() -> None:
    sources = "".join(
        path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")
    )
    records = json.loads(RECORDS.read_text(encoding="utf-8"))
    assert {"llama.cpp", "mlx-lm", "mlx-swift-lm", "PEFT", "vLLM"} <= records.keys()
    for host, found in records.items():
        assert re.search(rf'ran\(\s*"{re.escape(host)}"', sources), host
        for entry in found.values():
            assert entry["version"]
            datetime.date.fromisoformat(entry["date"])


def test_a_test_records_host_version_and_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    ran("a host", "nothing is written", version="1")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "hosts.json"))
    ran("a host", "b", version="1")
    ran("a host", "c", package="mlx")
    found = json.loads((tmp_path / "hosts.json").read_text())
    assert set(found) == {"a host"} and set(found["a host"]) == {"b", "c"}
    made = script("_hosts").table(found)
    assert made.splitlines()[2].startswith("| a host | 1, ")
