"""Makes command-line options from the fields of configuration dataclasses."""

import dataclasses
import functools
import re
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from mlx_dora.cli._help import OPTIONS, GroupedOption
from mlx_dora.cli._paths import FILE, PATH, PATH_OR_ID
from mlx_dora.cli._yaml import parse_yaml
from mlx_dora.errors import DoRAError

_MISSING = dataclasses.MISSING


class _Integer(click.ParamType):
    """An integer; accepts ``1e3``, as in YAML files, but not ``1.5`` or ``true``."""

    name = "integer"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        try:
            if not isinstance(value, bool) and int(value) == float(value):
                return int(value)
        except (TypeError, ValueError, OverflowError):
            pass
        raise click.BadParameter(
            f"{value!r} is not a whole number.", ctx=ctx, param=param
        )


class _Size(click.ParamType):
    """A number of bytes: ``4096``, ``500MB``, ``2G``, as mlx-lm reads them."""

    name = "size"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        match = re.fullmatch(r"(\d+\.?\d*) *(|MB?|GB?)", str(value).strip().upper())
        if match is None:
            raise click.BadParameter(
                f"{value!r} is not a size such as 500MB.", ctx=ctx, param=param
            )
        return int(float(match[1]) * {"": 1, "M": 10**6, "G": 10**9}[match[2][:1]])


class _Number(click.ParamType):
    """A float; does not accept ``true`` as 1."""

    name = "float"

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        try:
            if not isinstance(value, bool):
                return float(value)
        except (TypeError, ValueError, OverflowError):
            pass
        raise click.BadParameter(f"{value!r} is not a number.", ctx=ctx, param=param)


class _Text(click.ParamType):
    """A string; a YAML list or number is an error and is not converted to text."""

    name = "text"

    def convert(self, value: Any, param: Any, ctx: Any) -> str:
        if isinstance(value, str | Path):
            return str(value)
        raise click.BadParameter(f"expected text, got {value!r}.", ctx=ctx, param=param)


class _Names(click.ParamType):
    """Several names: ``a,b`` on the command line, a list in a YAML file."""

    name = "names"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, ...]:
        if isinstance(value, str):
            value = [part.strip() for part in value.split(",") if part.strip()]
        if isinstance(value, list | tuple) and all(isinstance(v, str) for v in value):
            return tuple(value)
        raise click.BadParameter(
            f"expected names, got {value!r}.", ctx=ctx, param=param
        )


class _Structure(click.ParamType):
    """A mapping or list: YAML text on the command line, the value itself in a file."""

    name = "yaml"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        if isinstance(value, str):
            try:
                value = parse_yaml(value, "it")
            except DoRAError as error:
                raise click.BadParameter(
                    f"{value!r} is not valid YAML.", ctx=ctx, param=param
                ) from error
        if isinstance(value, dict | list | tuple):
            return value
        raise click.BadParameter(
            f"expected a mapping or a list, got {value!r}.", ctx=ctx, param=param
        )


def _param_type(hint: Any) -> click.ParamType:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
        params = [_param_type(kind) for kind in kinds]
        # `dict | list` is a structure; no other union of several types is supported.
        if len({type(param) for param in params}) == 1:
            return params[0]
        raise TypeError(f"no option type for {hint!r}")
    if typing.get_origin(hint) is typing.Literal:
        return click.Choice([str(choice) for choice in typing.get_args(hint)])
    simple = {int: _Integer, float: _Number, str: _Text}
    if hint in simple:
        return simple[hint]()
    if hint is bool:
        return click.BOOL
    if hint is Path:
        return FILE
    if typing.get_origin(hint) in (tuple, list) and typing.get_args(hint)[0] is str:
        return _Names()
    if (typing.get_origin(hint) or hint) in (dict, list, tuple):
        return _Structure()
    raise TypeError(f"no option type for {hint!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Option:
    flags: tuple[str, ...]
    settings: dict[str, Any]

    @property
    def default(self) -> Any:
        return self.settings.get("default", _MISSING)

    def is_left_to_class(self, value: Any) -> bool:
        """Whether the config class should use its own default."""
        return value is None and isinstance(self.settings["type"], _Structure)


def _option(field: dataclasses.Field[Any], hint: Any, group: str) -> _Option:
    flag = "--" + field.name.replace("_", "-")
    kind = _param_type(hint)
    if field.metadata.get("unit") == "bytes":
        kind = _Size()
    if "path" in field.metadata and isinstance(kind, _Text):
        kind = PATH_OR_ID if field.metadata["path"] == "or id" else PATH
    if field.metadata.get("choices"):
        kind = click.Choice(field.metadata["choices"])
    settings: dict[str, Any] = {
        "help": field.metadata.get("help"),
        "type": kind,
        "cls": GroupedOption,
        "group": field.metadata.get("group") or group,
    }
    if "metavar" in field.metadata:
        settings["metavar"] = field.metadata["metavar"]
    if field.metadata.get("multiple"):
        settings |= {"type": _Text(), "multiple": True}
    if kind is click.BOOL:
        flag = f"{flag}/--no-{flag[2:]}"
    if isinstance(kind, _Structure):
        settings["default"] = None  # click would print and parse a mapping as text
    elif field.default is not _MISSING:
        settings["default"] = field.default
    elif field.default_factory is not _MISSING:
        settings["default"] = field.default_factory()
    else:
        settings["required"] = True
    extra = field.metadata.get("flags", ())
    return _Option(flags=(flag, *extra, field.name), settings=settings)


def _group_of(field: dataclasses.Field[Any], config: type) -> str:
    """The `OPTION_GROUP` of the class that declares the field."""
    home = next(
        cls
        for cls in config.__mro__
        if field.name in vars(cls).get("__annotations__", {})
    )
    return vars(home).get("OPTION_GROUP", OPTIONS)


def dataclass_options(
    *, exclude: tuple[str, ...] = (), **configs: type
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add an option for each field of each dataclass, and pass the objects on.

    ``@dataclass_options(train=TrainConfig, dora=DoRAConfig)`` adds ``--batch-size``,
    ``--rank`` and the other options, and calls the function with
    ``train=TrainConfig(...)`` and ``dora=DoRAConfig(...)``. Names, defaults and help
    come from the fields. A field's ``metadata`` holds ``"help"`` and, optionally,
    ``"group"`` (a title in the help, by default the class's ``OPTION_GROUP``),
    ``"choices"``, ``"flags": ("-m",)``, ``"unit": "bytes"``, ``"metavar"``,
    ``"multiple": True`` (a tuple of str from repeated flags), or ``"path"`` with the
    value ``"local"`` or ``"or id"``. A bool becomes ``--x/--no-x`` and a
    `typing.Literal` a choice; a tuple of str accepts ``a,b``, a dict or list accepts
    YAML, and a size in bytes accepts ``2GB``.

    A field without a default is a required option. A field that two classes share
    becomes one option, which sets both; the defaults must agree. Place the decorator
    above the function's ``click.option`` decorators, below `config_file_option`.

    Args:
        exclude: Fields that get no option and keep their default: a name, or an
            argument's name and a field's, as ``"reward.beta"``.
        **configs: The dataclass for each argument of the function.
    """
    hints = {key: typing.get_type_hints(config) for key, config in configs.items()}
    options: dict[str, _Option] = {}
    owned: dict[str, set[str]] = {key: set() for key in configs}
    for key, config in configs.items():
        for field in dataclasses.fields(config):
            if {field.name, f"{key}.{field.name}"} & {*exclude} or not field.init:
                continue
            owned[key].add(field.name)
            option = _option(field, hints[key][field.name], _group_of(field, config))
            known = options.setdefault(field.name, option)
            if known.default != option.default:
                raise TypeError(f"two defaults for the option {field.name!r}")

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(**values: Any) -> Any:
            chosen = {name: values.pop(name) for name in options}
            for key, config in configs.items():
                values[key] = config(
                    **{
                        name: value
                        for name, value in chosen.items()
                        if name in owned[key]
                        and not options[name].is_left_to_class(value)
                    }
                )
            return function(**values)

        decorated = call
        for option in reversed(options.values()):  # click shows the last option first
            decorated = click.option(*option.flags, **option.settings)(decorated)
        return decorated

    return decorate
