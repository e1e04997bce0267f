"""The tasks of the study, made from what every machine has; no download.

Each row is a question and its answer. All splits are fixed by hashes, so a Python
version gives the same rows on every run.
"""

import hashlib
import importlib
import inspect
import json
import random
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from mlx_dora.demo.data import (
    MODULES,
    _first_sentence,  # pyright: ignore[reportPrivateUsage] - the demo's own rule
    _public_members,  # pyright: ignore[reportPrivateUsage]
    demo_rows,
)

Row = tuple[str, str]
"""Question and answer."""

SIZES = {"train": 480, "valid": 64, "test": 128}
KINDS = ("class", "function", "method")

_FIRST = (
    "Ada Ben Cleo Dan Eva Finn Gus Hana Ivo June Kai Lena Max Nora Otto Pia".split()
)
_TOWNS = "Oslo Lima Cairo Delhi Quito Sofia Tunis Paris Turin Accra Perth Kyoto".split()
_JOBS = "baker nurse pilot tailor farmer lawyer welder singer miner editor".split()


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
        text = "".join(_line(row) for row in rows[: SIZES[split]])
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
    return _distinct(_record, "records")


def sums() -> dict[str, list[Row]]:
    """Rows with a sum or difference of two numbers below 100."""
    return _distinct(_sum, "sums")


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


def _distinct(draw: Callable[[random.Random], Row], name: str) -> dict[str, list[Row]]:
    random_numbers, seen = random.Random(name), set[str]()
    splits: dict[str, list[Row]] = {}
    for split, count in SIZES.items():
        rows: list[Row] = []
        while len(rows) < count:
            row = draw(random_numbers)
            if row[0] not in seen:
                seen.add(row[0])
                rows.append(row)
        splits[split] = rows
    return splits


def _sum(draw: random.Random) -> Row:
    first, second = draw.randrange(100), draw.randrange(100)
    if draw.random() < 0.5:
        return f"What is {first} + {second}?", f"The answer is {first + second}."
    return f"What is {first} - {second}?", f"The answer is {first - second}."


def _record(draw: random.Random) -> Row:
    name, town = draw.choice(_FIRST), draw.choice(_TOWNS)
    job, age = draw.choice(_JOBS), draw.randrange(18, 80)
    facts = {"name": name, "age": age, "job": job, "town": town}
    text = draw.choice(
        (
            f"{name} is {age} years old and works as a {job} in {town}.",
            f"In {town} lives {name}, a {job} of {age}.",
            f"The {job} from {town} is called {name} and is {age}.",
        )
    )
    return f"Write as JSON: {text}", json.dumps(facts)


def _line(row: Row) -> str:
    roles = zip(("user", "assistant"), row, strict=True)
    messages = [{"role": role, "content": content} for role, content in roles]
    return json.dumps({"messages": messages}) + "\n"


def _split_of(module: str) -> str:
    return {0: "valid", 1: "test", 2: "test"}.get(_draw(module)[0] % 9, "train")


def _draw(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _question_draw(row: object) -> bytes:
    return _draw(str(getattr(row, "question", "")))
