"""The file of the user's cache in which measured choices are kept.

``kernels.json`` maps a device (chip, MLX version and text of the kernels) to its
choices by case. It is replaced atomically, and written under a lock.
"""

import fcntl
import json
import logging
import math
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from mlx_dora.kernels.trial import Choice
from mlx_dora.openblas import cache_folder

logger = logging.getLogger(__name__)

Choices = dict[str, Choice]
"""Choices by `Case.text`."""

_VERSION = 1
_MOST_DEVICES = 8
_NUMBERS = ("kernel_us", "plain_us", "first_seconds", "error")


def kept_file() -> Path:
    """Return the path of the file; it need not exist."""
    return cache_folder() / "kernels.json"


def read_kept(device: str) -> Choices:
    """Return the choices kept for a device; none if there is no readable file.

    A damaged file is reported as a warning and then counts as empty, so that the
    choices are measured again.

    Args:
        device: The device and what else the choices depend on, as text.
    """
    return _read().get(device, {})


def keep(device: str, choices: Mapping[str, Choice]) -> None:
    """Add choices to the file, which lists at most eight devices, newest last.

    A file that cannot be written is reported as a warning: the next process will
    measure again.
    """
    path = kept_file()
    before = _read()
    merged = {**before.pop(device, {}), **choices}
    newest = [*before.items(), (device, merged)][-_MOST_DEVICES:]
    content = {
        "version": _VERSION,
        "devices": {
            name: {text: _sparse(choice) for text, choice in sorted(kept.items())}
            for name, kept in newest
        },
    }
    aside = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        aside.replace(path)
    except OSError as error:
        _warn_once(f"kernel choices cannot be kept: {error}")
    finally:
        if aside.exists():
            aside.unlink()


@contextmanager
def locked() -> Iterator[None]:
    """Hold the file's lock: processes measure one after another.

    The system releases the lock of a process that ends. Without a writable folder there
    is no lock, and each process measures for itself.
    """
    path = kept_file().with_suffix(".lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError:
        yield
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:  # a file system without locks
            _warn_once(f"{path} cannot be locked: {error}")
        yield
    finally:
        os.close(handle)


def _read() -> dict[str, Choices]:
    path = kept_file()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["version"] != _VERSION:
            return {}
        return {
            device: {text: _parsed(facts) for text, facts in kept.items()}
            for device, kept in content["devices"].items()
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:80]
        _warn_once(f"{path} is damaged ({reason}); the kernels are measured again")
        return {}


_WARNED: set[str] = set()


def _warn_once(text: str) -> None:
    if text not in _WARNED:
        _WARNED.add(text)
        logger.warning("%s", text)


def _sparse(choice: Choice) -> dict[str, Any]:
    return {name: value for name, value in asdict(choice).items() if value is not None}


def _parsed(facts: dict[str, Any]) -> Choice:
    unknown = facts.keys() - {field.name for field in fields(Choice)}
    takes, problem = facts["takes_kernel"], facts.get("problem")
    if unknown or not isinstance(takes, bool):
        raise ValueError(f"not a choice: {facts}")
    if problem is not None and (takes or not isinstance(problem, str)):
        raise ValueError(f"not a problem: {problem!r}")
    numbers = [facts[name] for name in _NUMBERS if name in facts]
    if not all(type(n) in (int, float) and math.isfinite(n) for n in numbers):
        raise ValueError(f"not numbers: {numbers}")
    return Choice(**facts)
