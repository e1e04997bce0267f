"""The ``-c/--config`` option, which reads options from a YAML file in mlx-lm's format.

A flag overrides the file, and the file overrides the default. Keys are the options'
long names with underscores or dashes; ``lora_parameters`` contains rank, scale, dropout
and keys, as in mlx-lm. A key set to ``null`` keeps its default.
"""

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from mlx_dora.cli._paths import FILE
from mlx_dora.cli._yaml import read_yaml
from mlx_dora.errors import DoRAError

# The keys inside these mappings are options; any other mapping is an option's value.
FLATTENED = ("lora_parameters",)


def read_config_file(path: Path) -> dict[str, Any]:
    """Read a YAML mapping; an empty file is an empty mapping.

    Raises:
        DoRAError: If the file is not YAML or does not hold a mapping.
    """
    loaded = read_yaml(path)
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        kind = type(loaded).__name__
        raise DoRAError(f"{path} must hold `key: value` lines, got a {kind}.")
    return {str(key): value for key, value in loaded.items()}


def _flatten(path: Path, config: dict[str, Any]) -> dict[str, tuple[str, Any]]:
    """Map each key to its spelling in the file and its value."""
    flat: dict[str, tuple[str, Any]] = {}

    def add(key: str, written: str, value: Any) -> None:
        name = key.replace("-", "_")
        if name in flat:
            raise DoRAError(
                f"{path}: {written} and {flat[name][0]} set the same option."
            )
        flat[name] = (written, value)

    for key, value in config.items():
        if key not in FLATTENED:
            add(key, key, value)
        elif isinstance(value, dict):
            for inner, inner_value in value.items():
                add(str(inner), f"{key}.{inner}", inner_value)
        elif value is not None:
            raise DoRAError(f"{path}: {key} must be a mapping, got {value!r}.")
    return flat


def _refuse_other_kind(
    path: Path, written: str, param: click.Option, value: Any
) -> None:
    """Refuse values that click's own types, made for text, cannot convert."""
    if param.type is click.BOOL and not isinstance(value, bool):
        raise DoRAError(f"{path}: {written} must be true or false, got {value!r}.")
    if param.type is click.STRING and isinstance(value, dict | list):
        raise DoRAError(f"{path}: {written} must be text, got {value!r}.")


def default_map(path: Path, params: list[click.Parameter]) -> dict[str, Any]:
    """Turn a config file into click's ``default_map`` for these parameters.

    Raises:
        DoRAError: If a key is not an option; lists similar names.
    """
    names: dict[str, click.Option] = {}
    for param in params:
        if isinstance(param, click.Option) and param.name is not None:
            for flag in (param.name, *(o[2:] for o in param.opts if o[:2] == "--")):
                names[flag.replace("-", "_")] = param
    defaults: dict[str, Any] = {}
    problems = []
    for name, (written, value) in _flatten(path, read_config_file(path)).items():
        if name == "config":  # present in mlx-lm's adapter_config.json
            continue
        if name in names:
            if value is not None:
                param = names[name]
                _refuse_other_kind(path, written, param, value)
                # Click would take a single text for a list of letters.
                several = param.multiple and isinstance(value, str)
                defaults[str(param.name)] = [value] if several else value
            continue
        near = difflib.get_close_matches(name, names, n=3)
        hint = f" (did you mean {', '.join(near)}?)" if near else ""
        problems.append(f"{written}{hint}")
    if problems:
        raise DoRAError(f"{path}: unknown keys: {', '.join(problems)}.")
    return defaults


def _use_file(ctx: click.Context, _param: click.Parameter, path: Path | None) -> None:
    if path is not None:
        ctx.default_map = default_map(path, ctx.command.params)


def config_file_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``-c/--config FILE``; place it directly below ``@verb``, above the options.

    The function does not receive this option. The file's values act as defaults of the
    other options.
    """
    return click.option(
        "-c",
        "--config",
        type=FILE,
        is_eager=True,
        expose_value=False,
        callback=_use_file,
        help="YAML file with options in mlx-lm's format; flags override it.",
    )(function)
