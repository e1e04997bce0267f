"""Uploading a folder to the Hugging Face Hub."""

import shlex
from pathlib import Path

from mlx_dora.errors import DoRAError

# What a training keeps for itself beside the adapter.
_PRIVATE = ("checkpoints/*", "best/*", ".*")


def check_upload(repo: str) -> None:
    """Refuse an upload that cannot succeed, before anything slow is done.

    Args:
        repo: Hub id, ``name`` or ``owner/name``.

    Raises:
        DoRAError: If the id is not one, or nobody is logged in.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        reason = " ".join(str(error).split())
        raise DoRAError(f"--upload-repo {repo!r} is no Hub id: {reason}") from error
    if get_token() is None:
        raise DoRAError(
            f"cannot upload to {repo}: not logged in to the Hugging Face Hub; run "
            "`hf auth login` or set HF_TOKEN."
        )


def upload_folder(folder: str | Path, repo: str) -> str:
    """Upload a folder's files; checkpoints stay here.

    Args:
        folder: An adapter or a model, with its card.
        repo: Hub id; the repository is made if there is none.

    Returns:
        The address of the repository.

    Raises:
        DoRAError: If the Hub refuses or cannot be reached; the folder is as it was.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        address = api.create_repo(repo, exist_ok=True)
        api.upload_folder(
            folder_path=folder,
            repo_id=address.repo_id,
            commit_message="Upload by mlx_dora",
            ignore_patterns=list(_PRIVATE),
        )
    except (OSError, ValueError, RuntimeError, _transport_error()) as error:
        reason = " ".join(str(error).split())
        raise DoRAError(
            f"{folder} is complete, but uploading it to {repo} failed "
            f"({type(error).__name__}: {reason:.200}); try again with "
            f"`{shlex.join(['hf', 'upload', repo, str(folder)])}`."
        ) from error
    return str(address)


def _transport_error() -> type[BaseException]:
    """What a failed connection raises: an error of the client that the hub's code uses.

    That client has been requests, httpx and httpx2; its `HTTPError` is above the error
    that huggingface_hub itself raises for an answer.
    """
    from huggingface_hub.errors import HfHubHTTPError

    return next(one for one in HfHubHTTPError.__mro__ if one.__name__ == "HTTPError")
