"""Uploads a folder to the Hugging Face Hub."""

import logging
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_dora.errors import DoRAError
from mlx_dora.io.hub_id import hub_id
from mlx_dora.publish.local_paths import public_config

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd

logger = logging.getLogger(__name__)

# Files beside the adapter that only training uses.
_PRIVATE = ("checkpoints/*", "best/*", ".*")


def check_upload(repo: str) -> None:
    """Refuse an upload that cannot succeed, before any slow work.

    Args:
        repo: Hub id, ``name`` or ``owner/name``.

    Raises:
        DoRAError: If `repo` is not a Hub id, or no user is logged in.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        reason = " ".join(str(error).split())
        raise DoRAError(f"--upload-repo {repo!r} is not a Hub id: {reason}") from error
    if get_token() is None:
        raise DoRAError(
            f"cannot upload to {repo}: not logged in to the Hugging Face Hub; run "
            "`hf auth login` or set HF_TOKEN."
        )


def upload_folder(folder: str | Path, repo: str) -> str:
    """Upload a folder's files in one commit, without checkpoints.

    Configs are uploaded without paths of this machine (see `public_config`), which
    stay in the folder: commands on this machine find the base by them.

    Args:
        folder: Folder of an adapter or a model, with its card.
        repo: Hub id; the repository is created if it does not exist.

    Returns:
        The address of the repository.

    Raises:
        DoRAError: If the Hub refuses or cannot be reached, or a config is damaged; the
            folder is unchanged.
    """
    from huggingface_hub import HfApi

    api, files = HfApi(), list(_public_files(Path(folder)))
    try:
        address = api.create_repo(repo, exist_ok=True)
        api.create_commit(
            address.repo_id, operations=files, commit_message="Upload by mlx_dora"
        )
    except (OSError, ValueError, RuntimeError, _transport_error()) as error:
        reason = " ".join(str(error).split())
        again = f"`{shlex.join(['hf', 'upload', repo, str(folder)])}`"
        if any(isinstance(file.path_or_fileobj, bytes) for file in files):
            call = f"upload_folder({str(folder)!r}, {repo!r})"
            again = (
                f"`mlx_dora.publish.{call}` in Python (`hf upload` would upload this "
                "machine's paths, too)"
            )
        raise DoRAError(
            f"{folder} is complete, but uploading it to {repo} failed "
            f"({type(error).__name__}: {reason:.200}); try again with {again}."
        ) from error
    return str(address)


def local_paths(folder: str | Path) -> list[tuple[str, str]]:
    """Return the paths of this machine in a folder's configs, with the file's name.

    Raises:
        DoRAError: If a config is not a JSON object.
    """
    folder = Path(folder)
    return [
        (name, path)
        for name in _names(folder)
        for path in public_config(folder / name)[1]
    ]


def _names(folder: Path) -> list[str]:
    """Return the files to upload, by their path in the folder."""
    from huggingface_hub.utils import filter_repo_objects

    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    names = [path.relative_to(folder).as_posix() for path in paths]
    return list(filter_repo_objects(names, ignore_patterns=list(_PRIVATE)))


def _public_files(folder: Path) -> "Iterator[CommitOperationAdd]":
    """Yield the files to upload, configs without local paths."""
    from huggingface_hub import CommitOperationAdd

    for name in _names(folder):
        content, local = public_config(folder / name)
        for path in local:
            known = hub_id(path)
            instead = (
                f"its Hub id {known} is"
                if known
                else ("whoever downloads the folder must name the model (--model)")
            )
            logger.warning(
                "%s: this machine's path %s is not uploaded; %s", name, path, instead
            )
        data = folder / name if content is None else content.encode()
        yield CommitOperationAdd(path_in_repo=name, path_or_fileobj=data)


def _transport_error() -> type[BaseException]:
    """Return the class of errors that a failed connection raises.

    It belongs to the HTTP client of huggingface_hub, which has been requests, httpx and
    httpx2. The client's `HTTPError` is a base class of huggingface_hub's own error.
    """
    from huggingface_hub.errors import HfHubHTTPError

    return next(cls for cls in HfHubHTTPError.__mro__ if cls.__name__ == "HTTPError")
