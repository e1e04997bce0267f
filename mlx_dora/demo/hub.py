"""The demo model's original weights, from the Hugging Face cache or the Hub."""

import logging
import os
import urllib.error
import urllib.request
from pathlib import Path

REPOSITORY = "HuggingFaceTB/SmolLM2-135M-Instruct"

_FILES = ["*.safetensors", "config.json", "generation_config.json", "tokenizer*.json"]
_TIMEOUT_SECONDS = 3.0

_log = logging.getLogger(__name__)


def hub_model() -> Path | None:
    """Return the original model's folder; None if neither cached nor reachable."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        cached = snapshot_download(
            REPOSITORY, allow_patterns=_FILES, local_files_only=True
        )
        if _complete(Path(cached)):
            return Path(cached)
    except LocalEntryNotFoundError:
        pass
    if not _reachable():
        return None
    try:
        fetched = snapshot_download(
            REPOSITORY, allow_patterns=_FILES, etag_timeout=_TIMEOUT_SECONDS
        )
    except OSError as error:  # base class of the Hub's own errors
        _log.info("the Hub answered, but the download failed: %s", error)
        return None
    return Path(fetched) if _complete(Path(fetched)) else None


def _complete(folder: Path) -> bool:
    return (folder / "config.json").exists() and any(folder.glob("*.safetensors"))


def _reachable() -> bool:
    """Whether the Hub offers the model; asked once, with a short timeout."""
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if HF_HUB_OFFLINE:
        return False
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    address = f"{endpoint}/{REPOSITORY}/resolve/main/config.json"
    try:
        request = urllib.request.Request(address, method="HEAD")
        with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS):
            return True
    except (urllib.error.URLError, TimeoutError, ValueError) as error:
        _log.info("no answer from %s: %s", endpoint, error)
        return False
