"""The ``--upload-repo`` option."""

import sys
from pathlib import Path

import click

from mlx_dora.cli._echo import echo
from mlx_dora.cli._help import GroupedOption

upload_option = click.option(
    "--upload-repo",
    metavar="ID",
    cls=GroupedOption,
    group="Publishing",
    help="Write a model card and upload the folder to this Hugging Face Hub "
    "repository, which is created if missing.",
)


def command_line() -> list[str]:
    """Return the words of the command as typed."""
    name = click.get_current_context().command_path.split()[0]
    return [name, *sys.argv[1:]]


def publish(folder: str | Path, card: str, repo: str) -> None:
    """Write the model card, upload the folder, and print its address."""
    from mlx_dora.io.atomic import write_text
    from mlx_dora.publish.upload import upload_folder

    write_text(Path(folder) / "README.md", card)
    echo(f"Uploaded to {upload_folder(folder, repo)}")
