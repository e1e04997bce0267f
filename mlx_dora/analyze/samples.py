"""Reads the log of a training's sampled completions, ``samples.jsonl``, for reports."""

from collections import defaultdict
from pathlib import Path
from typing import Any

from mlx_dora.errors import DoRAError
from mlx_dora.io.json import parse

SAMPLES_NAME = "samples.jsonl"
_SETS = ("train", "valid")
_SHOWN = 200
"""Number of samples in a report, the latest."""
_LENGTH = 300
"""Number of characters of a text in a report."""


def read_samples(path: Path) -> dict[str, Any]:
    """Read the mean rewards by step, and the latest samples.

    Returns:
        ``curve``, a row with ``step`` and the mean reward of ``train`` and ``valid``
        where there were samples; and ``rows``, the latest samples.

    Raises:
        DoRAError: If a line is not a sample; names it.
    """
    rewards: dict[tuple[int, str], list[float]] = defaultdict(list)
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        row = _checked(parse(line, f"{path}, line {number}"), f"{path}, line {number}")
        if row["reward"] is not None:
            rewards[row["step"], row["set"]].append(row["reward"])
        rows.append(row)
    means: dict[int, dict[str, Any]] = {}
    for (step, of), values in sorted(rewards.items()):
        means.setdefault(step, {"step": step})[of] = sum(values) / len(values)
    return {"curve": list(means.values()), "rows": rows[-_SHOWN:][::-1]}


def _checked(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DoRAError(f"{where} must hold a JSON object, got {row!r:.40}.")
    step, reward = row.get("step"), row.get("reward")
    if type(step) is not int or not 0 <= step < 2**53:
        raise DoRAError(f"{where}: step must be a whole number, got {step!r:.40}.")
    if row.get("set") not in _SETS:
        raise DoRAError(
            f"{where}: set must be {' or '.join(_SETS)}, got {row.get('set')!r:.40}."
        )
    is_number = isinstance(reward, int | float) and not isinstance(reward, bool)
    if reward is not None and not (is_number and abs(reward) < 1e300):
        raise DoRAError(f"{where}: reward must be a number, got {reward!r:.40}.")
    texts = {}
    for name in ("prompt", "completion"):
        if not isinstance(row.get(name), str):
            raise DoRAError(f"{where}: {name} must be text, got {row.get(name)!r:.40}.")
        texts[name] = row[name][:_LENGTH]
    return {"step": step, "set": row["set"], "reward": reward, **texts}
