"""The demo's data: questions about Python's standard library, answered by docstrings.

The rows come from the docstrings of the running Python, so the data is real, free to
use, and available on every machine. The model is asked, for example, what
``textwrap.dedent`` does and should answer in one terse sentence, like the docstring.
"""

import hashlib
import importlib
import inspect
import json
import re
import sys
import types
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_dora.errors import DoRAError
from mlx_dora.io.atomic import write_text

# Fast to import and without side effects. Modules missing on a platform are skipped.
_NAMES = """
argparse ast asyncio.events asyncio.locks asyncio.queues base64 bdb binascii bisect
bz2 calendar cmath cmd code codecs codeop collections colorsys compileall
concurrent.futures.thread configparser contextlib copy csv ctypes.util datetime
decimal difflib dis doctest email.charset email.header email.message email.utils
enum filecmp fileinput fnmatch fractions ftplib functools gc genericpath getopt
getpass gettext glob graphlib gzip hashlib heapq hmac html.parser http.client
http.cookiejar http.cookies http.server imaplib inspect io ipaddress itertools
json.decoder json.encoder keyword linecache locale logging logging.handlers lzma
mailbox math mimetypes modulefinder multiprocessing.connection
multiprocessing.managers multiprocessing.pool netrc ntpath numbers operator optparse
pathlib pdb pickle pickletools pkgutil platform plistlib poplib posixpath pprint
profile pstats py_compile pyclbr queue quopri random re reprlib runpy sched secrets
select selectors shelve shlex shutil signal site smtplib socket socketserver
sqlite3.dump ssl stat statistics string stringprep struct subprocess symtable
sysconfig tarfile tempfile textwrap threading time timeit token tokenize trace
traceback types unicodedata unittest.case unittest.loader unittest.mock
unittest.result unittest.suite urllib.parse urllib.request urllib.robotparser uuid
venv warnings wave weakref webbrowser wsgiref.handlers wsgiref.headers wsgiref.util
xml.dom.minidom xml.etree.ElementTree xml.sax.saxutils xmlrpc.client zipapp zipfile
zipimport zlib
"""
MODULES = tuple(_NAMES.split())

_ANSWER_LENGTH = range(20, 141)  # characters
_PARAMETERS_SHOWN = 5
_ROWS_PER_MODULE = 12  # so that large modules do not dominate


@dataclass(frozen=True, kw_only=True)
class QuestionAnswer:
    """A row: its module, the question, and the answer from the docstring."""

    module: str
    question: str
    answer: str

    def to_dict(self) -> dict[str, Any]:
        """Return the row in mlx-lm's chat format."""
        return {
            "messages": [
                {"role": "user", "content": self.question},
                {"role": "assistant", "content": self.answer},
            ]
        }


def write_demo_data(folder: str | Path) -> dict[str, int]:
    """Write train.jsonl, valid.jsonl and test.jsonl, in mlx-lm's chat format.

    Returns:
        The number of rows in each file.

    Raises:
        DoRAError: If this Python has no docstrings.
    """
    splits = demo_rows()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in splits.items():
        lines = (json.dumps(row.to_dict(), ensure_ascii=False) + "\n" for row in rows)
        write_text(folder / f"{name}.jsonl", "".join(lines))
    return {name: len(rows) for name, rows in splits.items()}


def demo_rows() -> dict[str, list[QuestionAnswer]]:
    """Return the rows of ``train``, ``valid`` and ``test``.

    The rows are the same on every run of a Python version. All rows of a module are in
    the same split, chosen by a hash of the module's name, and no answer occurs twice.
    So nothing in ``valid`` or ``test`` is seen in training.

    Raises:
        DoRAError: If this Python has no docstrings (``-OO`` strips them).
    """
    if sys.flags.optimize > 1:
        raise DoRAError(
            "the demo's data are docstrings, which this Python strips: start it "
            "without -OO and PYTHONOPTIMIZE=2."
        )
    splits: dict[str, list[QuestionAnswer]] = {"train": [], "valid": [], "test": []}
    seen: set[str] = set()
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # members are only inspected
        for name in sorted(MODULES):
            rows = [row for row in _rows(name) if row.answer not in seen]
            rows = sorted(rows, key=lambda row: _draw(row.question))[:_ROWS_PER_MODULE]
            seen.update(row.answer for row in rows)
            splits[_split_of(name)].extend(rows)
    return splits


def _split_of(module: str) -> str:
    """Return a module's split: 5/7 for training, 1/7 for validation, 1/7 for tests."""
    return {0: "valid", 1: "test"}.get(_draw(module)[0] % 7, "train")


def _draw(text: str) -> bytes:
    """Return pseudo-random bytes that are the same on every run and every machine."""
    return hashlib.sha256(text.encode()).digest()


def _rows(name: str) -> Iterator[QuestionAnswer]:
    """Yield a module's rows without repeated answers."""
    try:
        module = importlib.import_module(name)
    except ImportError:  # missing on this platform or in this build
        return
    answers: set[str] = set()
    for path, member in _public_members(module):
        answer = _first_sentence(inspect.getdoc(member) or "")
        if answer and answer not in answers:
            answers.add(answer)
            call = f"{name}.{path}{_parameters(member)}"
            question = f"What does Python's `{call}` do?"
            yield QuestionAnswer(module=name, question=question, answer=answer)


def _public_members(module: types.ModuleType) -> Iterator[tuple[str, Any]]:
    """Yield functions, classes and methods defined in this module, by name."""
    for name, member in sorted(vars(module).items()):
        if name.startswith("_") or _home(member) != module.__name__:
            continue
        if inspect.isroutine(member):
            yield name, member
        elif inspect.isclass(member):
            yield name, member
            for method_name, method in sorted(vars(member).items()):
                plain = inspect.isfunction(method) or inspect.ismethoddescriptor(method)
                if plain and not method_name.startswith("_"):
                    yield f"{name}.{method_name}", method


def _home(member: Any) -> str | None:
    """Return the module that defines a member; ``_bisect`` counts as ``bisect``."""
    home = getattr(member, "__module__", None)
    return home.lstrip("_") if isinstance(home, str) else None


def _parameters(member: Any) -> str:
    """Return parameters as ``(text, width)``, without defaults.

    Defaults may contain memory addresses. The names come from the code object, because
    `inspect.signature` would evaluate annotations.
    """
    code = getattr(member, "__code__", None)
    if code is None:  # a class, or a function written in C
        return ""
    count = code.co_argcount + code.co_kwonlyargcount
    names = [name for name in code.co_varnames[:count] if name != "self"]
    shown = names[:_PARAMETERS_SHOWN] + ["..."] * (len(names) > _PARAMETERS_SHOWN)
    return f"({', '.join(shown)})"


def _first_sentence(text: str) -> str:
    """Return the first sentence on one line, or "" if it is not a plain sentence."""
    opening = " ".join(text.split("\n\n")[0].split())
    sentence = re.split(r"(?<=[a-z0-9)`'\"]\.)\s", opening, maxsplit=1)[0]
    is_signature = "->" in sentence or re.match(r"[\w.]+\(", sentence)
    if is_signature or not sentence.endswith(".") or not sentence[0].isupper():
        return ""
    return sentence if len(sentence) in _ANSWER_LENGTH else ""
