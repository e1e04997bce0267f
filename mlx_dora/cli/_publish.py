"""The ``--upload-repo`` option."""

import sys
from pathlib import Path

import click

from mlx_dora.cli._echo import echo

upload_option = click.option(
    "--upload-repo",
    metavar="ID",
    help="Write a model card into the folder and upload it to this repository of the "
    "Hugging Face Hub (made if there is none).",
)


def command_line() -> list[str]:
    """The words of the command as it was given."""
    name = click.get_current_context().command_path.split()[0]
    return [name, *sys.argv[1:]]


def publish(folder: str | Path, card: str, repo: str) -> None:
    """Write the card, upload the folder, and say where it is."""
    from mlx_dora.io.atomic import write_text
    from mlx_dora.publish.upload import upload_folder

    write_text(Path(folder) / "README.md", card)
    echo(f"Uploaded to {upload_folder(folder, repo)}")
