"""Types and ranges of the values in PEFT's ``adapter_config.json``."""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any


def value_problems(content: Mapping[str, Any]) -> Iterable[str]:
    """Say of each value that is of a wrong type or range what it must be.

    A key that is missing or null has PEFT's default.
    """
    for key, (must_be, is_good) in _VALUES.items():
        value = content.get(key)
        if value is not None and not is_good(value):
            yield f"{key} must be {must_be}, got {value!r:.60}"
    for key in _PATTERNS:
        if isinstance(patterns := content.get(key), Mapping):
            for pattern in patterns:
                yield from _regex_problem(f"{key}: the key", rf"(.*\.)?({pattern})$")
    for key in ("target_modules", "exclude_modules"):
        if isinstance(pattern := content.get(key), str):
            yield from _regex_problem(key, pattern)
    for name in _texts(content.get("layers_pattern")):
        yield from _regex_problem("layers_pattern", rf"(?:^|.*?\.){name}\.(\d+)\.")


def _regex_problem(what: str, pattern: str) -> Iterable[str]:
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        yield (
            f"{what} {pattern!r:.60} is not a regular expression ({error}); a glob's "
            "`*` is `.*` there"
        )


def _is_rank(value: object) -> bool:
    return type(value) is int and value >= 1


def _is_factor(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # pyright: ignore[reportArgumentType] - it is a number by then


def _is_share(value: object) -> bool:
    return _is_factor(value) and 0 <= value < 1  # pyright: ignore[reportOperatorIssue]


def _is_flag(value: object) -> bool:
    return type(value) is bool


def _is_layers(value: object) -> bool:
    numbers = value if isinstance(value, list) else [value]
    return all(type(number) is int for number in numbers)


def _is_names(value: object) -> bool:
    names = value if isinstance(value, list) else [value]
    return all(isinstance(name, str) for name in names)


def _is_map_of(is_good: Callable[[object], bool]) -> Callable[[object], bool]:
    def check(value: object) -> bool:
        return isinstance(value, Mapping) and all(map(is_good, value.values()))

    return check


def _texts(value: object) -> list[str]:
    names = value if isinstance(value, list) else [value]
    return [name for name in names if isinstance(name, str)]


_PATTERNS = ("rank_pattern", "alpha_pattern")
_VALUES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "r": ("a whole number of at least 1", _is_rank),
    "lora_alpha": ("a finite number", _is_factor),
    "use_dora": ("true or false", _is_flag),
    "use_rslora": ("true or false", _is_flag),
    "lora_dropout": ("at least 0 and below 1", _is_share),
    "rank_pattern": (
        "a map from names to whole numbers of at least 1",
        _is_map_of(_is_rank),
    ),
    "alpha_pattern": ("a map from names to finite numbers", _is_map_of(_is_factor)),
    "target_modules": ("names or a regular expression", _is_names),
    "exclude_modules": ("names or a regular expression", _is_names),
    "layers_to_transform": ("a whole number or a list of them", _is_layers),
    "layers_pattern": ("a name or a list of names", _is_names),
    "base_model_name_or_path": ("text", lambda value: isinstance(value, str)),
}
