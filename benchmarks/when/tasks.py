"""The tasks of the study, made from what every machine has; no download.

Each row is a question and its answer. All splits are fixed by hashes, so a Python
version gives the same rows on every run.
"""

import hashlib
import importlib
import inspect
import warnings
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import numpy as np
from _made_tasks import Row, chat_line, distinct_rows, record_row

from mlx_dora.demo.data import (
    _first_sentence,  # pyright: ignore[reportPrivateUsage] - the demo's own rule
    _parameters,  # pyright: ignore[reportPrivateUsage]
    _public_members,  # pyright: ignore[reportPrivateUsage]
    demo_rows,
)

SIZES = {"train": 480, "valid": 64, "test": 128}
_TOPICS = {  # labels, and the modules that their sentences document
    "code": "ast bdb cmd code dis doctest inspect pdb symtable traceback "
    "unittest.case unittest.mock unittest.result",
    "files": "bz2 csv fileinput genericpath glob gzip io linecache lzma ntpath pathlib "
    "posixpath shutil tarfile tempfile zipfile zlib",
    "networks": "ftplib http.client http.cookiejar http.cookies http.server imaplib "
    "ipaddress poplib smtplib socket socketserver ssl urllib.parse urllib.request "
    "urllib.robotparser xmlrpc.client",
    "numbers": "cmath decimal fractions math numbers random statistics",
}
TOPICS = {topic: tuple(names.split()) for topic, names in _TOPICS.items()}


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


def topics() -> dict[str, list[Row]]:
    """Rows that ask which topic a call, with its sentence, is about.

    Balanced; no sentence is in two splits.
    """
    sentences: dict[str, list[str]] = {topic: [] for topic in TOPICS}
    of = {module: topic for topic, modules in TOPICS.items() for module in modules}
    seen: set[str] = set()
    for module, call, sentence in _documented(of):
        if sentence not in seen:
            seen.add(sentence)
            sentences[of[module]].append(f"`{call}` {sentence}")
    drawn = [sorted(texts, key=_draw) for texts in sentences.values()]
    asked = f"Is this about {', '.join([*TOPICS][:-1])} or {[*TOPICS][-1]}?"
    rows = [
        (f"{text}\n{asked}", topic)
        for texts in zip(*drawn, strict=False)
        for topic, text in zip(TOPICS, texts, strict=True)
    ]
    ends = np.cumsum([0, *SIZES.values()])
    return {
        split: rows[start:end]
        for split, start, end in zip(SIZES, ends, ends[1:], strict=False)
    }


def docstrings() -> dict[str, list[Row]]:
    """Rows of the demo's data: what a function does, answered by its docstring."""
    return {
        split: [(row.question, row.answer) for row in sorted(rows, key=_question_draw)]
        for split, rows in demo_rows().items()
    }


def records() -> dict[str, list[Row]]:
    """Rows with a sentence about a person, to be written as JSON."""
    return distinct_rows(record_row, "records", SIZES)


TASKS: dict[str, Callable[[], dict[str, list[Row]]]] = {
    "topics": topics,
    "docstrings": docstrings,
    "records": records,
}


def _documented(modules: Collection[str]) -> Iterator[tuple[str, str, str]]:
    """Yield module, call and first sentence of the members of standard modules."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        for name in sorted(modules):
            try:
                module = importlib.import_module(name)
            except ImportError:  # missing on this platform
                continue
            for path, member in _public_members(module):
                if sentence := _first_sentence(inspect.getdoc(member) or ""):
                    yield name, f"{path}{_parameters(member)}", sentence


def _draw(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _question_draw(row: object) -> bytes:
    return _draw(str(getattr(row, "question", "")))
