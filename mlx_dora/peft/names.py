"""Looks up the names that transformers uses for the modules of a model class.

PEFT identifies a module by its path in the model that transformers builds. For most
classes of mlx-lm the paths are the same; `classes` lists the others.
"""

import re
from pathlib import Path

import mlx.nn as nn

from mlx_dora.io.json import read_object
from mlx_dora.peft.classes import DIFFERENT, SAME, ClassNames

_HOST = "mlx_lm.models."


def class_of(model: nn.Module) -> str | None:
    """Return the name of an mlx-lm class's file; None for other libraries' classes."""
    module = type(model).__module__
    return module.removeprefix(_HOST) if module.startswith(_HOST) else None


def class_in_folder(folder: str | Path) -> str | None:
    """Return the name of the class that mlx-lm chooses for a local model folder.

    Returns:
        The name; None if the folder does not exist or its config has no
        ``model_type``.
    """
    config = Path(folder).expanduser() / "config.json"
    kind = read_object(config).get("model_type") if config.is_file() else None
    if not isinstance(kind, str) or kind in SAME or kind in DIFFERENT:
        return kind if isinstance(kind, str) else None
    from mlx_lm.utils import MODEL_REMAPPING

    return MODEL_REMAPPING.get(kind, kind)


def names_of(kind: str | None) -> ClassNames | None:
    """Return the names for a class of mlx-lm; None if transformers' are unknown."""
    if kind in SAME:
        return ClassNames()
    return None if kind is None else DIFFERENT.get(kind)


def look_plain(paths: list[str]) -> bool:
    """Whether paths look like the paths that most classes have in both libraries."""
    return all(re.match(r"model\.layers\.\d+\.|lm_head$", path) for path in paths)
