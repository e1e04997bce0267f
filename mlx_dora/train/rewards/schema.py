"""JSON Schema for the reward `valid_json`: the keywords that describe an answer.

Supported are ``type``, ``enum``, ``const``, ``properties``, ``required``,
``additionalProperties``, ``items``, ``anyOf``, ``allOf``, ``pattern``, and the bounds
``minimum``, ``maximum``, ``exclusiveMinimum``, ``exclusiveMaximum``, ``minLength``,
``maxLength``, ``minItems`` and ``maxItems``. Any other keyword that constrains values
is refused, so that no part of a schema is silently ignored.
"""

import operator
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from mlx_dora.errors import DoRAError

_NOTES = {"$schema", "$id", "$comment", "title", "description", "default", "examples"}
_TYPES: dict[str, Callable[[Any], bool]] = {
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
    "number": lambda value: _is_number(value),
    "integer": lambda value: _is_number(value) and value == int(value),
}
_SIZES: dict[str, tuple[type, Callable[[Any, Any], bool]]] = {
    "minLength": (str, operator.ge),
    "maxLength": (str, operator.le),
    "minItems": (list, operator.ge),
    "maxItems": (list, operator.le),
}
_BOUNDS: dict[str, Callable[[Any, Any], bool]] = {
    "minimum": operator.ge,
    "maximum": operator.le,
    "exclusiveMinimum": operator.gt,
    "exclusiveMaximum": operator.lt,
}
_LISTS = {"required", "enum", "anyOf", "allOf"}


def check_schema(schema: Any, where: str = "the schema") -> None:
    """Check that a schema has supported keywords with values of the right kind.

    Raises:
        DoRAError: If it does not; names the place in the schema.
    """
    if isinstance(schema, bool):
        return
    if not isinstance(schema, Mapping):
        raise DoRAError(f"{where} must be an object, got {schema!r:.40}")
    for word, value in schema.items():
        place = f"{where}.{word}"
        if word == "type":
            unknown = [kind for kind in _listed(value) if kind not in _TYPES]
            good = not unknown
        elif word in _SIZES or word in _BOUNDS:
            good = _is_number(value)
        elif word in _LISTS:
            good = isinstance(value, list)
        elif word == "pattern":
            good = isinstance(value, str) and _is_expression(value)
        elif word == "properties":
            good = isinstance(value, Mapping)
        else:
            good = word in _NOTES or word in ("const", "items", "additionalProperties")
            if not good:
                raise DoRAError(f"{place}: this keyword is not supported")
        if not good:
            raise DoRAError(f"{place} must not be {value!r:.40}")
    for place, part in _parts(schema):
        check_schema(part, f"{where}.{place}")


def schema_problem(value: Any, schema: Any) -> str:
    """Say what of a parsed JSON value violates a checked schema; empty if nothing."""
    return next(_problems(value, schema, "it"), "")


def _problems(value: Any, schema: Any, where: str) -> Iterator[str]:
    if isinstance(schema, bool):
        if not schema:
            yield f"{where} is not allowed"
        return
    for word, rule in schema.items():
        if word == "type" and not any(_TYPES[kind](value) for kind in _listed(rule)):
            yield f"{where} is not of type {rule}"
        elif word == "enum" and not any(_equal(value, item) for item in rule):
            yield f"{where} is none of {rule}"
        elif word == "const" and not _equal(value, rule):
            yield f"{where} is not {rule!r}"
        elif word in _SIZES:
            kind, holds = _SIZES[word]
            if isinstance(value, kind) and not holds(len(value), rule):
                yield f"{where} violates {word} {rule}"
        elif word in _BOUNDS:
            if _is_number(value) and not _BOUNDS[word](value, rule):
                yield f"{where} violates {word} {rule}"
        elif word == "pattern":
            if isinstance(value, str) and not re.search(rule, value):
                yield f"{where} does not match {rule}"
        elif word == "anyOf":
            if all(schema_problem(value, part) for part in rule):
                yield f"{where} satisfies no part of anyOf"
        elif word == "allOf":
            for part in rule:
                yield from _problems(value, part, where)
        elif word == "required" and isinstance(value, dict):
            missing = [name for name in rule if name not in value]
            yield from (f"{where} lacks {name!r}" for name in missing)
        elif word == "items" and isinstance(value, list):
            for number, item in enumerate(value):
                yield from _problems(item, rule, f"{where}[{number}]")
    if isinstance(value, dict):
        yield from _members(value, schema, where)


def _members(
    value: Mapping[str, Any], schema: Mapping[str, Any], where: str
) -> Iterator[str]:
    known, rest = schema.get("properties", {}), schema.get("additionalProperties", True)
    for name, inner in value.items():
        yield from _problems(inner, known.get(name, rest), f"{where}.{name}")


def _parts(schema: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The schemas inside a schema."""
    for name, part in schema.get("properties", {}).items():
        yield f"properties.{name}", part
    for word in ("items", "additionalProperties"):
        if word in schema:
            yield word, schema[word]
    for word in ("anyOf", "allOf"):
        for number, part in enumerate(schema.get(word, [])):
            yield f"{word}[{number}]", part


def _listed(kinds: Any) -> list[Any]:
    return kinds if isinstance(kinds, list) else [kinds]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _equal(first: Any, second: Any) -> bool:
    """Equality of JSON values, where true is not 1."""
    return isinstance(first, bool) == isinstance(second, bool) and first == second


def _is_expression(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True
