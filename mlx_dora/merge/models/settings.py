"""Parameters that differ by tensor: by filter, and by depth as a gradient.

Values are those of mergekit's YAML: a number or a truth value; a list of numbers, which
is a gradient over the blocks, interpolated linearly; or a list of
``{filter: text, value: ...}``, where the first filter contained in the tensor's name
wins.
"""

import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from mlx_dora.errors import DoRAError

_BLOCK = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")


def block_of(name: str) -> int | None:
    """Index of the block that a tensor belongs to; None outside the blocks."""
    match = _BLOCK.search(name)
    return None if match is None else int(match[1])


def block_prefix(name: str) -> str | None:
    """What stands before the index of a tensor's block; None outside the blocks."""
    match = _BLOCK.search(name)
    return None if match is None else name[: match.start(1)]


def with_block(name: str, block: int) -> str:
    """The name of the same tensor in another block."""
    match = _BLOCK.search(name)
    assert match is not None
    return f"{name[: match.start(1)]}{block}{name[match.end(1) :]}"


def depth_of(name: str, blocks: int) -> float:
    """Position of a tensor between the first block (0) and the last (1).

    As in mergekit, tensors outside the blocks are at 0 and a single block is at 1.
    """
    block = block_of(name)
    if block is None:
        return 0.0
    return block / (blocks - 1) if blocks > 1 else 1.0


def count_blocks(names: Sequence[str]) -> int:
    """Number of blocks of a model, from the names of its tensors."""
    blocks = [block for name in names if (block := block_of(name)) is not None]
    return max(blocks, default=-1) + 1


def check_setting(what: str, setting: Any) -> None:
    """Refuse a setting that is not a number, truth value, gradient or list of filters.

    Raises:
        DoRAError: With `what`, which names the setting, and the given value.
    """
    if _is_scalar(setting) or _is_gradient(setting) or _is_filter(setting):
        return
    if isinstance(setting, list | tuple) and setting and all(map(_is_filter, setting)):
        return
    raise DoRAError(
        f"{what} must be a number, a gradient [0, 1, ...], or filters "
        f"[{{filter: ..., value: ...}}, ...]; got {setting!r:.80}."
    )


def resolve(setting: Any, name: str, depth: float) -> float | bool | None:
    """The value of a checked setting for one tensor; None if no filter matches."""
    if _is_scalar(setting):
        return setting
    if isinstance(setting, Mapping):
        setting = [setting]
    if _is_scalar(setting[0]):
        if isinstance(setting[0], bool):
            return setting[int(depth * (len(setting) - 1))]
        place = depth * (len(setting) - 1)
        low = int(place)
        high = min(low + 1, len(setting) - 1)
        part = place - low
        return (1 - part) * setting[low] + part * setting[high]
    for entry in setting:
        wanted = entry.get("filter")
        if wanted in (None, "*") or wanted in name:
            return resolve(entry["value"], name, depth)
    return None


def layered(first: Any, second: Any) -> Any:
    """Combine checked settings; `second` applies where no filter of `first` matches."""
    filters = [first] if isinstance(first, Mapping) else first
    if _is_scalar(first) or _is_scalar(filters[0]):
        return first
    if isinstance(second, Mapping):
        second = [second]
    is_plain = _is_scalar(second) or _is_scalar(second[0])
    return [*filters, *([{"value": second}] if is_plain else second)]


def _is_filter(entry: Any) -> bool:
    """Whether an entry is ``{filter: text, value: a number or a gradient}``."""
    return (
        isinstance(entry, Mapping)
        and {"value"} <= {*entry} <= {"value", "filter"}
        and isinstance(entry.get("filter"), str | None)
        and (_is_scalar(entry["value"]) or _is_gradient(entry["value"]))
    )


def _is_gradient(value: Any) -> bool:
    is_list = isinstance(value, list | tuple) and bool(value)
    return is_list and all(_is_scalar(each) for each in value)


def _is_scalar(value: Any) -> bool:
    return isinstance(value, bool | int | float) and abs(value) <= sys.float_info.max
