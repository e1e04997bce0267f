"""``mlx_dora.server``: runs mlx-lm's server and checks every request."""

import argparse
from pathlib import Path

import click

from mlx_dora.cli._base_model import with_recorded_base
from mlx_dora.cli._framework import PassThrough, verb
from mlx_dora.cli._host import run_host_command
from mlx_dora.errors import DoRAError


@verb(
    "server",
    cls=PassThrough,
    examples=(
        "mlx_dora.server --adapter-path adapters --port 8080",
        "mlx_dora.server --model MODEL --adapter-root FOLDER",
    ),
)
@click.pass_context
def command(ctx: click.Context) -> None:
    """Serve a model over HTTP, like mlx_lm.server, using mlx_dora's layers.

    Adds the option `--adapter-root DIR`: a request may name only models and adapters
    in folders below DIR.
    """
    parser = _own_options(ctx.command_path)
    own, theirs = parser.parse_known_args(ctx.args)
    root = own.adapter_root
    if root is not None and not root.is_dir():
        raise DoRAError(f"--adapter-root {root} is not a folder.")

    def main() -> None:
        from mlx_dora.serve.host import main

        main(root)

    try:
        run_host_command("server", ctx.command_path, with_recorded_base(theirs), main)
    finally:
        if {"-h", "--help"} & set(theirs):
            options = parser.format_help().partition("\n\n")[2]
            click.echo(f"\nadded by mlx_dora, {options}", nl=False)


def _own_options(name: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=name, add_help=False, allow_abbrev=False)
    parser.add_argument(
        "--adapter-root",
        metavar="DIR",
        type=lambda text: Path(text).expanduser(),
        help="folder that holds the models and adapters that requests may name",
    )
    return parser
