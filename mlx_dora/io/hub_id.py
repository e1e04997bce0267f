"""Distinguishes ids on the Hugging Face Hub from local paths."""

import re
from itertools import pairwise
from pathlib import Path


def hub_id(text: str) -> str | None:
    """Return the Hub id of a model or data set; None for a local file or folder.

    A snapshot in the Hub's cache (``models--org--name/snapshots/...``) has an id.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    path = _path(text)
    if path is None:
        return None
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


def _path(text: str) -> Path | None:
    """Return a text as a path with the home folder expanded; None if it is no path."""
    try:
        path = Path(text).expanduser()
        path.exists()
    except (OSError, RuntimeError):  # too long; or ~ with an unknown user's name
        return None
    return path if text and "\0" not in text else None


def lasting_name(text: str) -> str:
    """Return the name by which a model is found again, from any working folder.

    That is the Hub id of the newest snapshot in the Hub's cache, the absolute path of
    any other local folder, and otherwise the text itself.
    """
    path = _path(text)
    if path is None or not path.exists():
        return text
    path = path.absolute()
    return _id_of_newest(path) or str(path)


def _id_of_newest(snapshot: Path) -> str | None:
    """Return the Hub id that stands for exactly this snapshot, or None."""
    from huggingface_hub.constants import HF_HUB_CACHE

    repository = snapshot.parent.parent
    newest = repository / "refs" / "main"
    is_cached = repository.parent == Path(HF_HUB_CACHE).expanduser().absolute()
    if not is_cached or snapshot.parent.name != "snapshots" or not newest.is_file():
        return None
    is_newest = newest.read_text(encoding="utf-8").strip() == snapshot.name
    return hub_id(str(snapshot)) if is_newest else None
