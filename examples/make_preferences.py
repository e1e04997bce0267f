"""Write a preference set about Python's standard library: right answers and others.

    python examples/make_preferences.py [FOLDER]

A prompt asks what a function or class of the standard library does. The chosen answer
is the first sentence of its docstring; the rejected answer is that of another member of
the same module, so both are real sentences of one style, and only one is true. The text
comes from the Python that runs the script: nothing is downloaded. All rows of a module
are in one of train.jsonl, valid.jsonl and test.jsonl, so the test asks about modules
that training does not show.
"""

import json
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

from mlx_dora.demo.data import QuestionAnswer, demo_rows


def pairs(rows: list[QuestionAnswer]) -> list[dict[str, Any]]:
    """Pair each question with its answer and that of the module's next question."""
    made = []
    for _, group in groupby(rows, key=lambda row: row.module):
        own = list(group)
        for row, other in zip(own, [*own[1:], own[0]], strict=True):
            if row.answer != other.answer:
                made.append(
                    {
                        "prompt": [{"role": "user", "content": row.question}],
                        "chosen": [{"role": "assistant", "content": row.answer}],
                        "rejected": [{"role": "assistant", "content": other.answer}],
                    }
                )
    return made


def write_preferences(folder: Path) -> dict[str, int]:
    """Write train.jsonl, valid.jsonl and test.jsonl; return their numbers of rows."""
    folder.mkdir(parents=True, exist_ok=True)
    counts = {}
    for name, rows in demo_rows().items():
        made = pairs(rows)
        lines = "".join(json.dumps(row) + "\n" for row in made)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        counts[name] = len(made)
    return counts


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "preferences")
    for split, count in write_preferences(folder).items():
        print(f"{split}: {count} pairs")
