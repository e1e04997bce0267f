"""Distinguishes ids on the Hugging Face Hub from local paths, which cards hide."""

import re
from itertools import pairwise
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from mlx_dora.page import local


def hub_id(text: str) -> str | None:
    """Return the Hub id of a model or data set; None for a local file or folder.

    A snapshot in the Hub's cache (``models--org--name/snapshots/...``) has an id.
    """
    if not _could_be_path(text):
        return None
    path = Path(text).expanduser()
    for place in (path.absolute(), path.resolve()):
        for part, below in pairwise(place.parts):
            match = re.fullmatch("(?:models|datasets)--(.+)", part)
            if match and below == "snapshots":
                return match[1].replace("--", "/")
    try:
        validate_repo_id(text)
    except HFValidationError:
        return None
    return None if path.exists() else text


def name_of(text: str) -> str:
    """Return the Hub id or last name of a local path; return other text unchanged."""
    return (local.is_local(text) and hub_id(text)) or local.name_of(text)


def _could_be_path(text: str) -> bool:
    return bool(text) and "\0" not in text and len(text) <= 4096
