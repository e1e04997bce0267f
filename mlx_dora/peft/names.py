"""Which names transformers has for the modules of a model, by the model's class.

PEFT finds a module by its path in the model that transformers makes. For most classes
of mlx-lm the paths are the same; `classes` holds the others.
"""

import re
from pathlib import Path

import mlx.nn as nn

from mlx_dora.io.json import read_object
from mlx_dora.peft.classes import DIFFERENT, SAME, ClassNames

_HOST = "mlx_lm.models."


def class_of(model: nn.Module) -> str | None:
    """The name of mlx-lm's model class, that of its file; None for a foreign class."""
    module = type(model).__module__
    return module.removeprefix(_HOST) if module.startswith(_HOST) else None


def class_in_folder(folder: str | Path) -> str | None:
    """The name of the class that mlx-lm would choose for a local model folder.

    Returns:
        None if there is no such folder, or its config names no ``model_type``.
    """
    config = Path(folder).expanduser() / "config.json"
    kind = read_object(config).get("model_type") if config.is_file() else None
    if not isinstance(kind, str) or kind in SAME or kind in DIFFERENT:
        return kind if isinstance(kind, str) else None
    from mlx_lm.utils import MODEL_REMAPPING

    return MODEL_REMAPPING.get(kind, kind)


def names_of(kind: str | None) -> ClassNames | None:
    """The names of a class of mlx-lm; None if those of transformers are not known."""
    if kind in SAME:
        return ClassNames()
    return None if kind is None else DIFFERENT.get(kind)


def look_plain(paths: list[str]) -> bool:
    """Whether paths look like those that most classes have in both libraries."""
    return all(re.match(r"model\.layers\.\d+\.|lm_head$", path) for path in paths)
