"""``mlx_dora.extract``: extracts an adapter from a fine-tuned model."""

import click

from mlx_dora.cli._echo import note
from mlx_dora.cli._framework import verb
from mlx_dora.cli._json import JsonOutput, json_option, overwrite_option
from mlx_dora.cli._paths import PATH, PATH_OR_ID
from mlx_dora.cli._progress import WorkDisplay
from mlx_dora.cli._report import show_report


@verb(
    "extract",
    examples=(
        "mlx_dora.extract BASE TUNED --rank 16 --save-path extracted",
        "mlx_dora.extract BASE TUNED --energy 0.9 --save-path extracted",
    ),
)
@click.argument("base", type=PATH_OR_ID)
@click.argument("tuned", type=PATH_OR_ID)
@click.option(
    "--rank",
    type=click.IntRange(min=1),
    help="Rank of the updates; a maximum with --energy.",
)
@click.option(
    "--energy",
    type=float,
    help="Share of each update's energy to keep. Where that takes more than an eighth "
    "of a matrix's directions, its decomposition is dense, which is slower and holds "
    "several float64 copies of it: 4 s and 310 MB for 2048 x 2048.",
)
@click.option(
    "--key",
    "keys",
    multiple=True,
    help="A module to cover (self_attn.q_proj, or a full path); by default all linear "
    "layers of the blocks. Repeatable.",
)
@click.option("--save-path", type=PATH, required=True, help="Output adapter folder.")
@json_option()
@overwrite_option()
def command(
    base: str,
    tuned: str,
    rank: int | None,
    energy: float | None,
    keys: tuple[str, ...],
    save_path: str,
    json_output: JsonOutput,
    overwrite: bool,
) -> None:
    """Extract a DoRA adapter from BASE and the fine-tuned model TUNED.

    Magnitudes are exact; directions come from a truncated SVD. Reports the error; -v
    shows each matrix. Give --rank, --energy or both.
    """
    if rank is None and energy is None:
        raise click.UsageError("give --rank, --energy or both")
    note(f"Comparing {tuned} with {base} ...")
    from mlx_dora.merge.adapters.extract import extract_adapter

    json_output.check(base, tuned, save_path)
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
    show_report(extraction, save_path)
    json_output.write({**extraction.to_dict(), "save_path": save_path})
