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
import sys
import types
import typing
from collections.abc import Mapping
from typing import Any

from mlx_dora.errors import DoRAError

MISSING = dataclasses.MISSING


def option(
    default: Any = MISSING,
    *,
    help: str,
    least: float | None = None,
    above: float | None = None,
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
        below: Bound that the value must stay under.
        special: Additional allowed values, for example -1 for "all".
        may_change: Whether a resumed run may use another value. Set it only if the
            option affects neither the weights after a step nor the log.
        recorded: Whether the adapter records the value in its training summary.
        variant: The only variant of DoRA that reads the option. The adapter records it
            for that variant.
        **metadata: Further command line settings: ``choices``, ``flags``, ``unit``,
            ``path`` and ``group``, the title under which the help lists the option.
    """
    facts = {
        "help": help,
        "least": least,
        "above": above,
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
    for field, kinds in _fields(type(config)):
        value = getattr(config, field.name)
        if (value is None and types.NoneType in kinds) or _is_special(field, value):
            continue
        if problem := _problem(kinds, field.metadata, value):
            raise DoRAError(f"{field.name} must be {problem}, got {value!r:.200}.")


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


def _is_special(field: dataclasses.Field[Any], value: Any) -> bool:
    return type(value) is int and value in field.metadata.get("special", ())


def _problem(kinds: tuple[Any, ...], facts: Mapping[str, Any], value: Any) -> str:
    """Describe what the value must be; empty if the value is valid."""
    kind = kinds[0]
    if typing.get_origin(kind) is typing.Literal:
        choices = typing.get_args(kind)
        return "" if value in choices else _either(choices)
    if kind is bool:
        return "" if type(value) is bool else "true or false"
    if kind is int:
        if type(value) is not int:
            return "a whole number"
        return "" if _is_within(facts, value) else _bounds(facts)
    if kind is float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return f"a finite number {_bounds(facts)}".rstrip()
        if _is_finite(value) and _is_within(facts, value):
            return ""
        return _bounds(facts) or "a finite number"
    if kind is str:
        return "" if isinstance(value, str) else "text"
    origins = tuple(typing.get_origin(kind) or kind for kind in kinds)
    if dict in origins and not isinstance(value, origins):
        return "a mapping or a list" if list in origins else "a mapping"
    return ""


def _is_finite(value: float) -> bool:
    if isinstance(value, int):  # an integer beyond the float range is unusable
        return abs(value) <= sys.float_info.max
    return math.isfinite(value)


def _is_within(facts: Mapping[str, Any], value: float) -> bool:
    least, above, below = (facts.get(name) for name in ("least", "above", "below"))
    return (
        (least is None or value >= least)
        and (above is None or value > above)
        and (below is None or value < below)
    )


def _bounds(facts: Mapping[str, Any]) -> str:
    words = {"above": "above", "least": "at least", "below": "below"}
    parts = [
        f"{text} {facts[name]}"
        for name, text in words.items()
        if facts.get(name) is not None
    ]
    special = "".join(f"{value} or " for value in facts.get("special", ()))
    return special + " and ".join(parts)


def _either(choices: tuple[Any, ...]) -> str:
    *most, last = (str(choice) for choice in choices)
    return f"{', '.join(most)} or {last}" if most else last
