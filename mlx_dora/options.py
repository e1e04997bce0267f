"""Options: fields of the config dataclasses that carry their own metadata.

To add an option, add a field::

    iters: int = option(1000, help="Batches to train for.", least=1, may_change=True)

The command line makes a flag from the field, and `check_options` checks its value. A
resumed run requires the same value unless `may_change` is set, and an adapter records
the value if `recorded` is set.
"""

import dataclasses
import functools
import math
import operator
import sys
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from mlx_dora.errors import DoRAError

MISSING = dataclasses.MISSING

_BOUNDS = {
    "above": ("above", operator.gt),
    "least": ("at least", operator.ge),
    "most": ("at most", operator.le),
    "below": ("below", operator.lt),
}


def option(
    default: Any = MISSING,
    *,
    help: str,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    special: tuple[int, ...] = (),
    may_change: bool = False,
    recorded: bool = False,
    variant: str | None = None,
    **metadata: Any,
) -> Any:
    """Declare a config field together with the facts about it.

    Args:
        default: Value to use when the option is not set; without it the option is
            required.
        help: Help text of the command line.
        least: Smallest allowed value.
        above: Bound that the value must exceed.
        most: Largest allowed value.
        below: Bound that the value must stay under.
        special: Additional allowed values, for example -1 for "all".
        may_change: Whether a resumed run may use another value. Set it only if the
            option affects neither the weights after a step nor the log.
        recorded: Whether the adapter records the value in its training summary.
        variant: The only variant of DoRA that reads the option. The adapter records it
            for that variant.
        **metadata: ``items``, the name of a list's items in messages, and further
            command line settings: ``choices``, ``flags``, ``unit``, ``path`` and
            ``group``, the title under which the help lists the option.
    """
    facts = {
        "help": help,
        "least": least,
        "above": above,
        "most": most,
        "below": below,
        "special": special,
        "may_change": may_change,
        "recorded": recorded,
        "variant": variant,
        **metadata,
    }
    return dataclasses.field(default=default, metadata=facts)


def check_options(config: Any) -> None:
    """Check each field of a config against its type and its declared bounds.

    Raises:
        DoRAError: Names the field, the allowed values and the value received.
    """
    for problem in option_problems(config):
        raise DoRAError(f"{problem}.")


def option_problems(config: Any) -> Iterator[str]:
    """Yield what `check_options` refuses: one text per field or entry of a mapping."""
    for field, kinds in _fields(type(config)):
        values = {field.name: getattr(config, field.name)}
        if isinstance(values[field.name], dict) and (entry := _entry_of(kinds)):
            mapping = values.pop(field.name)
            kinds = _kinds(entry)
            values = {f"{field.name} {key!r:.60}": mapping[key] for key in mapping}
        for name, value in values.items():
            if expected := _expected(kinds, field.metadata, value):
                yield f"{name} must be {expected}, got {value!r:.200}"


def names_with(config: Any, fact: str, value: Any = True) -> list[str]:
    """Names of the fields of a config class or object whose `fact` is `value`."""
    fields = dataclasses.fields(config)
    return [field.name for field in fields if field.metadata.get(fact) == value]


@functools.cache
def _fields(config: type) -> list[tuple[dataclasses.Field[Any], tuple[Any, ...]]]:
    """Each field with the types that its type hint allows."""
    hints = typing.get_type_hints(config)
    return [(field, _kinds(hints[field.name])) for field in dataclasses.fields(config)]


def _kinds(hint: Any) -> tuple[Any, ...]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return typing.get_args(hint)
    return (hint,)


def _entry_of(kinds: tuple[Any, ...]) -> Any:
    """Return the type of a mapping's values; None if they are not checked."""
    for kind in kinds:
        if typing.get_origin(kind) in (dict, Mapping):
            entry = typing.get_args(kind)[1]
            return None if entry is Any else entry
    return None


def _expected(kinds: tuple[Any, ...], facts: Mapping[str, Any], value: Any) -> str:
    """Describe what the value must be; empty if the value is valid."""
    if type(value) is int and value in facts.get("special", ()):
        return ""
    if value is None and types.NoneType in kinds:
        return ""
    wanted = [_wanted(kind, facts, value) for kind in kinds if kind != types.NoneType]
    return " or ".join(wanted) if all(wanted) else ""


_WORDS = {
    bool: ("true or false", "flags"),
    int: ("a whole number", "whole numbers"),
    str: ("text", "texts"),
    dict: ("a mapping", "mappings"),
    Mapping: ("a mapping", "mappings"),
    list: ("a list", "lists"),
}


def _wanted(kind: Any, facts: Mapping[str, Any], value: Any) -> str:
    origin, args = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin is typing.Literal:
        return "" if value in args else _either(args)
    if origin is tuple:
        items = facts.get("items") or _WORDS[args[0]][1]
        valid = isinstance(value, list | tuple)
        if valid and args[0] is str:  # thousands of keys: no call for each
            valid = set(map(type, value)) <= {str}
        elif valid:
            valid = not any(_wanted(args[0], facts, item) for item in value)
        return "" if valid else f"a list of {items}"
    if origin is float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return f"a finite number {_bounds(facts)}".rstrip()
        if _is_finite(value) and _is_within(facts, value):
            return ""
        return _bounds(facts) or "a finite number"
    if origin not in _WORDS:
        return ""
    if not isinstance(value, origin) or (origin is int and isinstance(value, bool)):
        return _WORDS[origin][0]
    return "" if origin is not int or _is_within(facts, value) else _bounds(facts)


def _is_finite(value: float) -> bool:
    if isinstance(value, int):  # an integer beyond the float range is unusable
        return abs(value) <= sys.float_info.max
    return math.isfinite(value)


def _is_within(facts: Mapping[str, Any], value: float) -> bool:
    return all(
        compare(value, facts[name])
        for name, (_, compare) in _BOUNDS.items()
        if facts.get(name) is not None
    )


def _bounds(facts: Mapping[str, Any]) -> str:
    parts = [
        f"{text} {facts[name]}"
        for name, (text, _) in _BOUNDS.items()
        if facts.get(name) is not None
    ]
    special = "".join(f"{value} or " for value in facts.get("special", ()))
    return special + " and ".join(parts)


def _either(choices: tuple[Any, ...]) -> str:
    *most, last = (str(choice) for choice in choices)
    return f"{', '.join(most)} or {last}" if most else last
