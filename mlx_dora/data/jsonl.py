"""Rows of training data from files and from the Hub, each with its origin."""

import dataclasses
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_dora.data.config import DataConfig, hub_entries
from mlx_dora.errors import DoRAError
from mlx_dora.io.json import parse

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows as they were read.

    Args:
        values: One mapping a row; lists and Hub data sets both will do.
        source: What to call them in messages.
        lines: Line numbers of the rows, when they come from a file.
        config: The names of their features.
    """

    values: Sequence[Any]
    source: str
    config: DataConfig
    lines: Sequence[int] | None = None

    def where(self, index: int) -> str:
        """Name one row, for a message."""
        if self.lines is None:
            return f"{self.source}, row {index}"
        return f"{self.source}, line {self.lines[index]}"


def read_jsonl(path: Path, config: DataConfig) -> Rows:
    """Read a file with one JSON object per line; blank lines are passed over.

    Raises:
        DoRAError: If a line is not a JSON object or there is none.
    """
    values: list[Any] = []
    lines: list[int] = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                values.append(_row(line, path, number, is_first=not values))
                lines.append(number)
    if not values:
        raise DoRAError(f"{path} is empty: expected one JSON object per line.")
    return Rows(values=values, source=str(path), lines=lines, config=config)


def _row(line: bytes, path: Path, number: int, *, is_first: bool) -> Mapping[str, Any]:
    try:
        row = parse(line, f"{path}, line {number},")
    except DoRAError as error:
        cause = error.__cause__
        if not isinstance(cause, json.JSONDecodeError):
            raise
        text = cause.doc.rstrip()
        is_cut = is_first and cause.pos >= len(text)
        if is_cut and text.startswith("["):
            raise DoRAError(_layout(path, "a JSON array", ".[]")) from None
        if is_cut and text.startswith("{"):
            what = "a JSON object spread over several lines"
            raise DoRAError(_layout(path, what, ".")) from None
        raise DoRAError(
            f"{path}, line {number}: not JSON ({cause.msg} at character "
            f"{cause.pos + 1} of the line)."
        ) from None
    if is_first and isinstance(row, list) and any(isinstance(r, dict) for r in row):
        raise DoRAError(_layout(path, "a JSON array", ".[]"))
    if not isinstance(row, Mapping):
        raise DoRAError(
            f'{path}, line {number}: expected a JSON object such as {{"text": ...}}, '
            f"got a {type(row).__name__}."
        )
    return row


def _layout(path: Path, what: str, expression: str) -> str:
    return (
        f"{path} holds {what}; expected one JSON object per line. Rewrite it, for "
        f"instance with: jq -c '{expression}' {shlex.quote(path.name)} > new.jsonl"
    )


def read_splits(
    config: DataConfig, names: Sequence[str] = SPLITS
) -> dict[str, list[Rows]]:
    """Read the named splits of a data set; a split that does not exist has no rows.

    Raises:
        DoRAError: If the data set is not there, or one of its files is malformed.
    """
    if config.hf_dataset is not None:
        return _read_hub_entries(config, names)
    folder = Path(config.data).expanduser()
    if folder.is_dir():
        paths = {name: folder / f"{name}.jsonl" for name in names}
        found = {name: path for name, path in paths.items() if path.exists()}
        if not found:
            wanted = ", ".join(path.name for path in paths.values())
            raise DoRAError(f"{folder} has none of {wanted}.")
        return {
            name: [read_jsonl(found[name], config)] if name in found else []
            for name in names
        }
    if folder.exists():
        raise DoRAError(
            f"{folder} is a file; data must be a folder with train.jsonl, valid.jsonl "
            "or test.jsonl."
        )
    return _read_hub(config, names)


def _hub() -> Any:
    try:
        import datasets  # pyright: ignore[reportMissingImports]  # optional
    except ImportError:
        raise DoRAError(
            "reading a data set from the Hugging Face Hub needs the package "
            "'datasets': pip install datasets."
        ) from None
    return datasets


def _could_be_on_hub(name: str) -> bool:
    parts = name.split("/")
    return len(parts) <= 2 and all(p and p not in (".", "..", "~") for p in parts)


def _read_hub(config: DataConfig, names: Sequence[str]) -> dict[str, list[Rows]]:
    name = config.data
    if not _could_be_on_hub(name):
        raise DoRAError(f"data folder {name} does not exist.")
    try:
        datasets = _hub()
    except DoRAError as error:
        raise DoRAError(
            f"there is no folder {name}, and as a name on the Hub: {error}"
        ) from None
    try:
        found = datasets.load_dataset(name)
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        raise DoRAError(
            f"there is no folder {name}, and no such data set could be had from the "
            f"Hub: {_one_line(error)}"
        ) from error
    return {
        split: [Rows(values=found[split], source=f"{name} ({split})", config=config)]
        if split in found
        else []
        for split in names
    }


def _read_hub_entries(
    config: DataConfig, names: Sequence[str]
) -> dict[str, list[Rows]]:
    datasets = _hub()
    defaults = {"train": "train[:80%]", "valid": "train[-10%:]", "test": None}
    splits: dict[str, list[Rows]] = {name: [] for name in names}
    features = ("prompt_feature", "completion_feature", "chat_feature", "text_feature")
    for entry in hub_entries(config.hf_dataset):
        named = {key: entry[key] for key in features if key in entry}
        reading = dataclasses.replace(config, **named)
        for name in names:
            split = entry.get(f"{name}_split", defaults[name])
            if split is None:
                continue
            extra = entry.get("config") or {}
            try:
                found = datasets.load_dataset(entry["path"], split=split, **extra)
            except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
                raise DoRAError(
                    f"hf_dataset {entry['path']} ({split}): {_one_line(error)}"
                ) from error
            source = f"{entry['path']} ({split})"
            splits[name].append(Rows(values=found, source=source, config=reading))
    return splits


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
