"""The options ``--card`` and ``--upload-repo``."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from mlx_dora.cli._echo import echo, note
from mlx_dora.cli._help import GroupedOption

_CARD = click.option(
    "--card",
    is_flag=True,
    cls=GroupedOption,
    group="Publishing",
    help="Write a model card, README.md, into the folder.",
)
_UPLOAD = click.option(
    "--upload-repo",
    metavar="ID",
    cls=GroupedOption,
    group="Publishing",
    help="Write a model card and upload the folder to this Hugging Face Hub "
    "repository, which is created if missing.",
)


def publish_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options to a command."""
    return _CARD(_UPLOAD(command))


def check_repo(repo: str | None) -> None:
    """Refuse an upload that cannot succeed, before any slow work."""
    if repo is not None:
        from mlx_dora.publish.upload import check_upload

        check_upload(repo)


def command_line() -> list[str]:
    """Return the words of the command as typed."""
    name = click.get_current_context().command_path.split()[0]
    return [name, *sys.argv[1:]]


def publish(folder: str | Path, card: str, repo: str | None) -> None:
    """Write the model card; upload the folder if `repo` is given."""
    from mlx_dora.io.atomic import write_text
    from mlx_dora.publish.upload import local_paths, upload_folder

    path = Path(folder) / "README.md"
    write_text(path, card)
    echo(f"Model card: {path}")
    if repo is None:
        for name, local in local_paths(folder):
            note(
                f"{name} names {local} on this machine: to upload this folder without "
                "that path, use --upload-repo."
            )
    else:
        echo(f"Uploaded to {upload_folder(folder, repo)}")
