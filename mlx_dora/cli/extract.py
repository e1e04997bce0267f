"""``mlx_dora.extract``: extracts an adapter from a fine-tuned model."""

import click

from mlx_dora.cli._echo import echo
from mlx_dora.cli._framework import verb
from mlx_dora.cli._paths import PATH, PATH_OR_ID
from mlx_dora.cli._progress import WorkDisplay


@verb("extract")
@click.argument("base", type=PATH_OR_ID)
@click.argument("tuned", type=PATH_OR_ID)
@click.option(
    "--rank",
    type=click.IntRange(min=1),
    help="Rank of the updates; a maximum with --energy.",
)
@click.option("--energy", type=float, help="Share of each update's energy to keep.")
@click.option(
    "--key",
    "keys",
    multiple=True,
    help="A module to cover (self_attn.q_proj, or a full path); by default all linear "
    "layers of the blocks. Repeatable.",
)
@click.option("--save-path", type=PATH, required=True, help="Output adapter folder.")
@click.option("--overwrite", is_flag=True, help="Replace an existing output folder.")
def command(
    base: str,
    tuned: str,
    rank: int | None,
    energy: float | None,
    keys: tuple[str, ...],
    save_path: str,
    overwrite: bool,
) -> None:
    """Extract a DoRA adapter from BASE and the fine-tuned model TUNED.

    Magnitudes are exact; directions come from a truncated SVD. Prints the error of each
    matrix. Give --rank, --energy or both.
    """
    from mlx_dora.merge.adapters.extract import extract_adapter

    if rank is None and energy is None:
        raise click.UsageError("give --rank, --energy or both")
    with WorkDisplay(with_memory=True) as display:
        extraction = extract_adapter(
            base,
            tuned,
            rank=rank,
            energy=energy,
            keys=keys or None,
            save_path=save_path,
            overwrite=overwrite,
            progress=display.progress,
        )
    for line in extraction.lines():
        echo(line)
    echo(f"Saved to {save_path}")
