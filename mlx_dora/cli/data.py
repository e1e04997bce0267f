"""``mlx_dora.data``: shows what would be trained, before training."""

import dataclasses
import json

import click

from mlx_dora.adapters.config import DoRAConfig
from mlx_dora.cli._data_view import show_preview
from mlx_dora.cli._echo import echo
from mlx_dora.cli._framework import verb
from mlx_dora.cli._options import dataclass_options
from mlx_dora.cli._paths import FILE, PATH, PATH_OR_ID
from mlx_dora.cli._publish import command_line
from mlx_dora.data.config import DataConfig
from mlx_dora.data.formats import FORMATS
from mlx_dora.train.config import TrainConfig

_SHOWN = {
    *(field.name for field in dataclasses.fields(DataConfig)),
    *("model", "batch_size", "max_seq_length", "packing"),
    *("grad_checkpoint", "trust_remote_code", "rank", "num_layers"),
} - {"data", "hf_dataset"}
_HIDDEN = tuple(
    field.name
    for config in (TrainConfig, DoRAConfig)
    for field in dataclasses.fields(config)
    if field.name not in _SHOWN
)


@verb("data")
@click.argument("data", type=PATH_OR_ID)
@dataclass_options(train=TrainConfig, dora=DoRAConfig, exclude=_HIDDEN)
@click.option(
    "--rows",
    type=click.IntRange(min=0),
    default=3,
    show_default=True,
    help="Rows to show per split.",
)
@click.option("--html", type=FILE, help="Also write a self-contained HTML page.")
@click.option(
    "--json",
    "json_file",
    type=PATH,
    help="Also write everything as JSON; - prints only the JSON.",
)
@click.option("--overwrite", is_flag=True, help="Replace existing files.")
def command(
    data: str,
    train: TrainConfig,
    dora: DoRAConfig,
    rows: int,
    html: str | None,
    json_file: str | None,
    overwrite: bool,
) -> None:
    """Show what would be trained from DATA: a folder, a file or a Hub data set.

    Marks the tokens that count in the loss, draws a histogram of the lengths, lists the
    rows that are cut, skipped or in two splits, suggests flags of mlx_dora.train that
    fit this machine, and says which well-known models would. Loads only the tokenizer
    of --model.
    """
    from mlx_dora.io.atomic import write_text
    from mlx_dora.io.output import check_output_file
    from mlx_dora.train.plan.preview import preview_training, render_preview

    if train.model is None:
        raise click.UsageError("give --model, whose tokenizer reads the rows")
    outputs = [f for f in (json_file, html) if f is not None and str(f) != "-"]
    for place, file in enumerate(outputs):
        inputs = (data, train.model, *outputs[:place])
        check_output_file(file, inputs=inputs, overwrite=overwrite)
    train = dataclasses.replace(train, data=data)
    preview = preview_training(train, dora, samples=rows)
    if html is not None:
        write_text(html, render_preview(preview, command_line()))
    if json_file is not None:
        content = preview.to_dict()
        text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
        if json_file == "-":
            click.echo(text)
            return
        write_text(json_file, text + "\n")
    show_preview(preview)
    for file in outputs:
        echo(f"Saved {file}")


command.epilog = "Formats of rows, by their columns: " + "; ".join(
    f"{f.title} ({', '.join(f.required(DataConfig()))})" for f in FORMATS
)
