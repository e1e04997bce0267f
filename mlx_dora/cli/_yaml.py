"""YAML as mlx-lm reads it: ``1e-5`` is a number; a key given twice is an error.

The one reader of YAML, from files and from options. Dates stay text: no option is one.
"""

import re
import sys
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import ComposerError

from mlx_dora.errors import DoRAError

_FLOAT = re.compile(
    r"""^(?:
     [-+]?(?:[0-9][0-9_]*)\.[0-9_]*(?:[eE][-+]?[0-9]+)?
    |[-+]?(?:[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)
    |\.[0-9_]+(?:[eE][-+]?[0-9]+)?
    |[-+]?\.(?:inf|Inf|INF)
    |\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)
_MAX_DEPTH = 50
_MAX_VALUES = 1_000_000
# What PyYAML's constructors raise for a tag that its value does not fit, as in
# ``!!bool maybe`` (KeyError), ``!!int ''`` (IndexError), ``!!timestamp x``.
_BAD_VALUE = (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError)


class _Loader(yaml.SafeLoader):
    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._checked: set[int] = set()

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        # Before ``<<`` mixes another mapping's keys in, which may be overridden.
        if id(node) not in self._checked:
            self._checked.add(id(node))
            self._refuse_twice(node)
        super().flatten_mapping(node)

    def _refuse_twice(self, node: yaml.MappingNode) -> None:
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                continue  # the parent class refuses it
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is given twice", node.start_mark
                )
            seen.add(key)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        number = super().construct_yaml_int(node)
        if abs(number) > sys.float_info.max:
            raise yaml.constructor.ConstructorError(
                None, None, "a number is too large", node.start_mark
            )
        return number


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in forms if not tag.endswith(":timestamp")]
    for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def parse_yaml(text: str, where: object) -> Any:
    """Parse one YAML (or JSON) document.

    Args:
        text: The document.
        where: What the error names: a file, or an option.

    Raises:
        DoRAError: If it is not YAML, nested too deeply, or its aliases repeat each
            other without end; one line.
    """
    try:
        _check_size(text)
        # A SafeLoader with one more form of numbers and without dates.
        return yaml.load(text.removeprefix("\ufeff"), Loader=_Loader)
    except ComposerError as error:
        if "single document" not in str(error):
            raise _invalid(where, error) from error
        raise DoRAError(
            f"{where} holds several YAML documents (---): put each in a file of its "
            "own."
        ) from error
    except _BAD_VALUE as error:
        raise _invalid(where, error) from error


def _invalid(where: object, error: Exception) -> DoRAError:
    return DoRAError(f"{where} is not valid YAML: {' '.join(str(error).split())}")


def read_yaml(path: Path) -> Any:
    """Read a YAML file.

    Raises:
        DoRAError: If it is not a YAML document in UTF-8.
        OSError: If it cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DoRAError(f"{path} is not valid YAML: {error}") from error
    return parse_yaml(text, path)


def _check_size(text: str) -> None:
    """Refuse deep nesting and aliases that grow, before anything recurses into them.

    PyYAML's parser takes events one by one; its composer and constructor recurse.
    """
    sizes: dict[str, int] = {}  # of what an anchor names, its aliases spelled out
    opened: list[tuple[str | None, int]] = []  # anchor, and values before it
    total = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.CollectionEndEvent):
            anchor, before = opened.pop()
            if anchor is not None:
                sizes[anchor] = total - before
        elif isinstance(event, yaml.AliasEvent):
            if any(anchor == event.anchor for anchor, _ in opened):
                raise yaml.YAMLError(f"the alias {event.anchor!r:.60} holds itself")
            total += sizes.get(event.anchor, 1)
        elif isinstance(event, yaml.CollectionStartEvent | yaml.ScalarEvent):
            total += 1
            if isinstance(event, yaml.CollectionStartEvent):
                opened.append((event.anchor, total))
        if len(opened) > _MAX_DEPTH:
            raise yaml.YAMLError(f"it is nested deeper than {_MAX_DEPTH} levels")
        if total > _MAX_VALUES:
            raise yaml.YAMLError(f"it holds more than {_MAX_VALUES:,} values")
