"""The tasks of the study, made from what every machine has; no download.

Each row is a question and its answer. All splits are fixed by hashes, so a Python
version gives the same rows on every run.
"""

import hashlib
import importlib
import inspect
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from _made_tasks import Row, chat_line, distinct_rows, record_row, sum_row

from mlx_dora.demo.data import (
    MODULES,
    _first_sentence,  # pyright: ignore[reportPrivateUsage] - the demo's own rule
    _public_members,  # pyright: ignore[reportPrivateUsage]
    demo_rows,
)

SIZES = {"train": 480, "valid": 64, "test": 128}
KINDS = ("class", "function", "method")


def write_task(name: str, folder: Path) -> str:
    """Write train, valid and test.jsonl, in chat format.

    Returns:
        A hash of the three files, which depend on the Python version.
    """
    folder.mkdir(parents=True, exist_ok=True)
    total = hashlib.sha256()
    for split, rows in TASKS[name]().items():
        if len(rows) < SIZES[split]:
            raise SystemExit(f"{name}: {len(rows)} {split} rows, not {SIZES[split]}.")
        text = "".join(map(chat_line, rows[: SIZES[split]]))
        total.update(text.encode())
        (folder / f"{split}.jsonl").write_text(text)
    return total.hexdigest()[:16]


def kinds() -> dict[str, list[Row]]:
    """Rows that ask whether a sentence documents a class, a function or a method.

    Balanced; all sentences of a module are in the same split.
    """
    sentences: dict[str, dict[str, list[str]]] = {
        split: {kind: [] for kind in KINDS} for split in SIZES
    }
    seen: set[str] = set()
    for module, kind, sentence in _documented():
        if sentence not in seen:
            seen.add(sentence)
            sentences[_split_of(module)][kind].append(sentence)
    splits: dict[str, list[Row]] = {}
    for split, by_kind in sentences.items():
        ordered = [sorted(texts, key=_draw) for texts in by_kind.values()]
        balanced = zip(*ordered, strict=False)
        splits[split] = [
            (f'"{text}"\nDoes this document a class, a function or a method?', kind)
            for texts in balanced
            for kind, text in zip(KINDS, texts, strict=True)
        ]
    return splits


def docstrings() -> dict[str, list[Row]]:
    """Rows of the demo's data: what a function does, answered by its docstring."""
    return {
        split: [(row.question, row.answer) for row in sorted(rows, key=_question_draw)]
        for split, rows in demo_rows().items()
    }


def records() -> dict[str, list[Row]]:
    """Rows with a sentence about a person, to be written as JSON."""
    return distinct_rows(record_row, "records", SIZES)


def sums() -> dict[str, list[Row]]:
    """Rows with a sum or difference of two numbers below 100."""
    return distinct_rows(sum_row, "sums", SIZES)


TASKS: dict[str, Callable[[], dict[str, list[Row]]]] = {
    "kinds": kinds,
    "docstrings": docstrings,
    "records": records,
    "sums": sums,
}


def _documented() -> Iterator[tuple[str, str, str]]:
    """Yield module, kind and first sentence of the standard library's members."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        for name in sorted(MODULES):
            try:
                module = importlib.import_module(name)
            except ImportError:  # missing on this platform
                continue
            for path, member in _public_members(module):
                if sentence := _first_sentence(inspect.getdoc(member) or ""):
                    is_method = "method" if "." in path else "function"
                    kind = "class" if inspect.isclass(member) else is_method
                    yield name, kind, sentence


def _split_of(module: str) -> str:
    return {0: "valid", 1: "test", 2: "test"}.get(_draw(module)[0] % 9, "train")


def _draw(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _question_draw(row: object) -> bytes:
    return _draw(str(getattr(row, "question", "")))
