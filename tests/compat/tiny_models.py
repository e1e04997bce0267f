"""Every model class that mlx-lm ships, built tiny at random from its own arguments.

Sizes are set by the names that configurations share, in `tiny_sizes` with what single
classes want besides; what a class does not know it is not given.
"""

import dataclasses
import importlib
import inspect
import pkgutil
import sys
import types
import typing
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from tests.compat.tiny_sizes import OWN, SIZES, TEXT_MODELS

# Packages that a model file only looks for: an empty one will do.
_ASKED_FOR = {"olmo": "hf_olmo"}
_NESTED = ("text_config", "llm_config", "language_config")
_TEXT_ARGUMENTS = ("TextArgs", "TextConfig", "TextModelArgs")


def model_files() -> dict[str, bool]:
    """Every file of mlx_lm/models, and whether it holds a model with its arguments.

    The others are parts that models share.
    """
    import mlx_lm.models

    return {
        entry.name: {"Model", "ModelArgs"} <= vars(_module(entry.name)).keys()
        for entry in pkgutil.iter_modules(mlx_lm.models.__path__)
    }


def build(name: str, bits: int | None = None) -> nn.Module:
    """A tiny random model, evaluated, in eval mode.

    Args:
        name: The file's, without ``.py``.
        bits: Quantise it the way ``mlx_lm.convert -q`` does, in groups of 32.

    Raises:
        Exception: Whatever the class does with arguments it cannot take.
    """
    from mlx_lm.utils import quantize_model

    module = _module(name)
    mx.random.seed(0)
    model = module.Model(_arguments(module.ModelArgs, name))
    model.update(tree_map(_not_zero, model.parameters()))
    if bits is not None:
        quantize_model(model, {}, 32, bits)
    mx.eval(model.parameters())
    return model.eval()


def _module(name: str) -> Any:
    if name in _ASKED_FOR:
        sys.modules.setdefault(_ASKED_FOR[name], types.ModuleType(_ASKED_FOR[name]))
    return importlib.import_module(f"mlx_lm.models.{name}")


def _not_zero(parameter: mx.array) -> mx.array:
    """Random numbers for zeros, which would hide what is multiplied by them."""
    if not mx.issubdtype(parameter.dtype, mx.floating) or mx.any(parameter):
        return parameter
    return 0.1 * mx.random.normal(parameter.shape).astype(parameter.dtype)


def _arguments(kind: Any, name: str) -> Any:
    own = OWN.get(name, {})
    if "__dataclass_fields__" not in vars(kind):
        return kind.from_dict(SIZES | own | {"model_type": name})
    values: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        if not field.init:
            continue
        if field.name in own:
            values[field.name] = own[field.name]
        elif field.name in ("layer_types", "attention_layers"):
            continue
        elif field.name in _NESTED:
            values[field.name] = _nested(name) | {"model_type": name}
        elif field.name in SIZES:
            values[field.name] = SIZES[field.name]
        elif field.name == "model_type":
            values[field.name] = name
        elif _is_required(field):
            values[field.name] = _default(field.type, kind)
    return kind.from_dict(values) if hasattr(kind, "from_dict") else kind(**values)


def _nested(name: str) -> dict[str, Any]:
    if name in TEXT_MODELS:
        name = TEXT_MODELS[name]
        kinds = [_module(name).ModelArgs]
    else:
        found = [vars(_module(name)).get(kind) for kind in _TEXT_ARGUMENTS]
        kinds = [kind for kind in found if kind is not None]
    if not kinds:
        return dict(SIZES)
    made = vars(_arguments(kinds[0], name))
    return {key: value for key, value in made.items() if not key.startswith("_")}


def _is_required(field: Any) -> bool:
    missing = dataclasses.MISSING
    return field.default is missing and field.default_factory is missing


def _default(kind: Any, owner: Any) -> Any:
    if isinstance(kind, str):
        kind = typing.get_type_hints(owner).get(kind, kind)
    options = [one for one in typing.get_args(kind) if one is not type(None)]
    chosen = options[0] if typing.get_origin(kind) is typing.Union else kind
    origin = typing.get_origin(chosen) or chosen
    plain = {int: 4, float: 1.0, bool: False, str: "silu", list: [], dict: {}}
    if inspect.isclass(origin):
        return plain.get(origin)
    return None
