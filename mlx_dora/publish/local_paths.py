"""Takes the paths of this machine out of the configs that are uploaded."""

import json
from pathlib import Path
from typing import Any

from mlx_dora.io.hub_id import hub_id
from mlx_dora.io.json import read_object
from mlx_dora.page.local import is_local

_CONFIGS = ("adapter_config.json", "config.json", "tokenizer_config.json")
# Keys of mlx_dora, mlx-lm, PEFT and transformers whose value may be a path.
_KEYS = (
    "model",
    "data",
    "adapter_path",
    "resume_adapter_file",
    "config",
    "_name_or_path",
    "name_or_path",
    "base_model_name_or_path",
)


def public_config(path: Path) -> tuple[str | None, list[str]]:
    """Return the content of a config without local paths.

    A path of a snapshot in the Hub's cache becomes its Hub id. Any other path becomes
    null: its last name could be taken for a Hub id.

    Args:
        path: A file of the folder to upload.

    Returns:
        The new content, or None if the file can be uploaded as it is; and the paths
        that are replaced.

    Raises:
        DoRAError: If a config is not a JSON object.
    """
    if path.name not in _CONFIGS:
        return None, []
    replaced: list[str] = []
    content = _public(read_object(path), "", replaced)
    return json.dumps(content, indent=4) if replaced else None, replaced


def _public(value: Any, key: str, replaced: list[str]) -> Any:
    if isinstance(value, dict):
        return {k: _public(item, k, replaced) for k, item in value.items()}
    if isinstance(value, list):
        return [_public(item, key, replaced) for item in value]
    if key in _KEYS and isinstance(value, str) and is_local(value):
        replaced.append(value)
        return hub_id(value)
    return value
