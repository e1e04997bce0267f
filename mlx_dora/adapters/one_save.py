"""Writes and reads an adapter's two files as a unit.

Tensors and config carry the same id, a digest of both. A folder whose writer was killed
between the two files is refused. A reader that runs beside a writer gets either the old
or the new adapter.
"""

import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_dora.adapters.adapter import Adapter
from mlx_dora.adapters.format import parse_config
from mlx_dora.errors import DoRAError
from mlx_dora.io.atomic import flush
from mlx_dora.io.gate import check_dtypes, read_tensors
from mlx_dora.io.header import read_header_and_metadata
from mlx_dora.io.json import parse

TENSORS_NAME = "adapters.safetensors"
CONFIG_NAME = "adapter_config.json"

_ID_KEY = "mlx_dora_save"
_TRIES = 11
_FIRST_PAUSE = 0.002  # seconds; doubled each time, so that all pauses take 2 s
_ABSENT_TRIES = 3
_LEFT_OUT = ("base", "training")


def identified(
    config: dict[str, Any], tensors: Mapping[str, mx.array]
) -> tuple[dict[str, Any], dict[str, str]]:
    """The config of a save and the metadata of its tensors, both with the save's id.

    Args:
        config: Content of the config, with a section ``mlx_dora``.
        tensors: The arrays by name, as stored.
    """
    save = _digest(config, tensors)
    content = {**config, "mlx_dora": {**config["mlx_dora"], "save": save}}
    return content, {_ID_KEY: save}


def remove_unidentified(folder: Path) -> None:
    """Delete a config without an id (of an older version, or mlx-lm's).

    Nothing could tell it from that of the tensors about to be written.
    """
    old = folder / CONFIG_NAME
    if old.exists() and _id_of(old) is None:
        old.unlink()
        flush(folder)


def read_one_save(folder: Path) -> tuple[Adapter, dict[str, mx.array]]:
    """Read an adapter without tensors, and its tensors, from the same save.

    If files are missing or from two saves, a writer may be replacing them, so reading
    is repeated for a while.

    Raises:
        DoRAError: If the folder is not an adapter, a file is invalid, or the files come
            from two saves.
    """
    absent = 0
    for attempt in range(_TRIES):
        try:
            return _read(folder)
        except _UnsettledError as error:
            # Without a writer, a missing folder or file stays missing. But a writer may
            # have finished just before this check.
            is_alone = error.is_absent and not _has_writer(folder)
            absent = absent + 1 if is_alone else 0
            if attempt + 1 == _TRIES or absent == _ABSENT_TRIES:
                raise DoRAError(str(error)) from None
        time.sleep(_FIRST_PAUSE * 2**attempt)
    raise AssertionError


class _UnsettledError(Exception):
    """Raised for a state that a concurrent writer may be about to change.

    Args:
        message: The error if the state does not change.
        is_absent: Whether a file or the folder is missing.
    """

    def __init__(self, message: str, *, is_absent: bool) -> None:
        super().__init__(message)
        self.is_absent = is_absent


def _read(folder: Path) -> tuple[Adapter, dict[str, mx.array]]:
    config_path, tensors_path = folder / CONFIG_NAME, folder / TENSORS_NAME
    _check_present(folder)
    try:
        state = _state(config_path), _state(tensors_path)
        content = _content(config_path)
        infos, metadata = read_header_and_metadata(tensors_path)
        adapter = _parsed(content, config_path)
        is_full = adapter.fine_tune_type == "full"
        check_dtypes(tensors_path, infos, all_weights=not is_full)
        tensors = read_tensors(tensors_path, infos=infos)
        if (_state(config_path), _state(tensors_path)) != state:
            raise FileNotFoundError
    except FileNotFoundError:
        _check_present(folder)
        raise _UnsettledError(f"{folder} is being replaced.", is_absent=False) from None
    except RuntimeError as error:
        if tensors_path.exists():
            raise DoRAError(f"{tensors_path} cannot be read: {error}.") from error
        raise _UnsettledError(f"{folder} is being replaced.", is_absent=False) from None
    _check_same_save(folder, content, metadata.get(_ID_KEY))
    return adapter, tensors


def _parsed(content: dict[str, Any], config_path: Path) -> Adapter:
    try:
        return parse_config(content, config_path)
    except DoRAError as error:
        raise DoRAError(f"{config_path}: {error}") from error


def _check_present(folder: Path) -> None:
    if not folder.is_dir():
        raise _UnsettledError(
            f"{folder} is not an adapter folder: there is no such folder.",
            is_absent=True,
        )
    for name in (CONFIG_NAME, TENSORS_NAME):
        if not (folder / name).is_file():
            hint = ""
            if (folder / "adapter_model.safetensors").is_file():
                hint = (
                    " It looks like a PEFT adapter; convert it: "
                    f"mlx_dora.convert {folder} {folder}-mlx --to mlx"
                )
            raise _UnsettledError(
                f"{folder} is not an adapter folder: it has no {name}.{hint}",
                is_absent=True,
            )


def _check_same_save(
    folder: Path, content: dict[str, Any], of_tensors: str | None
) -> None:
    ours = content.get("mlx_dora")
    of_config = ours.get("save") if isinstance(ours, dict) else None
    # If only one file has an id, another tool has rewritten a file, which is allowed.
    if of_tensors is None or of_config is None or of_tensors == of_config:
        return
    hint = ""
    if any((folder / "checkpoints").glob("[0-9]*")):
        hint = "; resume the training in it (--resume) from its checkpoints"
    raise _UnsettledError(
        f"{folder} mixes two saves: {CONFIG_NAME} is not from the same save as "
        f"{TENSORS_NAME}, as if a process was killed between writing them{hint} or "
        "make the adapter again.",
        is_absent=False,
    )


def _has_writer(folder: Path) -> bool:
    """Whether a file beside or in a folder shows that it is being written."""
    name = folder.resolve().name
    beside = folder.resolve().parent.glob(f".{name}.*.partial")
    inside = folder.glob(".adapter*.partial*") if folder.is_dir() else ()
    return any(beside) or any(inside)


def _state(path: Path) -> tuple[int, int, int]:
    state = path.stat()
    return state.st_ino, state.st_mtime_ns, state.st_size


def _content(path: Path) -> dict[str, Any]:
    content = parse(path.read_bytes(), path)
    if not isinstance(content, dict):
        raise DoRAError(f"{path} must hold a JSON object, got {content!r:.60}.")
    return content


def _id_of(config_path: Path) -> str | None:
    try:
        ours = _content(config_path).get("mlx_dora")
    except (DoRAError, FileNotFoundError):
        return None
    return ours.get("save") if isinstance(ours, dict) else None


def _digest(config: dict[str, Any], tensors: Mapping[str, mx.array]) -> str:
    """Hash all values that determine an adapter; equal saves have equal files."""
    total = hashlib.sha256()
    ours = {k: v for k, v in config["mlx_dora"].items() if k not in _LEFT_OUT}
    total.update(json.dumps({**config, "mlx_dora": ours}, sort_keys=True).encode())
    for name in sorted(tensors):
        value = tensors[name]
        total.update(f"{name} {value.dtype} {value.shape}".encode())
        if value.size:
            data = memoryview(value.reshape(-1).view(mx.uint8))  # pyright: ignore[reportArgumentType] - it has the buffer protocol
            total.update(data)
    return total.hexdigest()[:32]
