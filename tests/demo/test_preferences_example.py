"""The pairs that examples/make_preferences.py writes."""

import importlib.util
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def example() -> Any:
    path = ROOT / "examples" / "make_preferences.py"
    spec = importlib.util.spec_from_file_location("make_preferences", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pairs_differ_and_test_modules_are_new(tmp_path: Path) -> None:
    counts = example().write_preferences(tmp_path)
    assert counts["train"] > 500
    modules: dict[str, set[str]] = {}
    for name, count in counts.items():
        lines = (tmp_path / f"{name}.jsonl").read_text().splitlines()
        assert len(lines) == count > 0
        rows = [json.loads(line) for line in lines]
        assert all(row["chosen"] != row["rejected"] for row in rows)
        questions = [row["prompt"][0]["content"].split("`")[1] for row in rows]
        modules[name] = {".".join(q.split("(")[0].split(".")[:1]) for q in questions}
        answers = [row["chosen"][0]["content"] for row in rows]
        assert len({*answers}) == len(answers)
        # Each rejected answer is the right answer of another question.
        assert {row["rejected"][0]["content"] for row in rows} <= {*answers}
    assert len(modules["test"] - modules["train"]) > 5
