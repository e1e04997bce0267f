"""``mlx_dora.data``: shows what would be trained, before training."""

import dataclasses
from pathlib import Path

import click

from mlx_dora.adapters.config import DoRAConfig
from mlx_dora.cli._data_view import show_preview
from mlx_dora.cli._echo import echo, note
from mlx_dora.cli._framework import verb
from mlx_dora.cli._help import GroupedOption
from mlx_dora.cli._json import STDOUT, JsonOutput, json_option, overwrite_option
from mlx_dora.cli._options import dataclass_options
from mlx_dora.cli._paths import FILE, PATH_OR_ID
from mlx_dora.cli._publish import command_line
from mlx_dora.data.config import DataConfig
from mlx_dora.data.formats import FORMATS
from mlx_dora.train.config import TrainConfig
from mlx_dora.train.grpo.config import RewardConfig
from mlx_dora.train.objectives.config import PreferenceConfig

_SHOWN = {
    *("objective", "truncation_mode", "reward_funcs", "reward_arguments"),
    *("num_generations", "max_completion_length"),
    *(field.name for field in dataclasses.fields(DataConfig)),
    *("model", "batch_size", "batch_tokens", "max_seq_length", "packing"),
    *("grad_checkpoint", "trust_remote_code", "rank", "num_layers"),
} - {"data", "hf_dataset"}
_HIDDEN = tuple(
    field.name
    for config in (TrainConfig, DoRAConfig, PreferenceConfig, RewardConfig)
    for field in dataclasses.fields(config)
    if field.name not in _SHOWN
)


@verb(
    "data",
    examples=(
        "mlx_dora.data my_data --model MODEL --mask-prompt",
        "mlx_dora.data alpaca.csv --model MODEL --html data.html",
    ),
)
@click.argument("data", type=PATH_OR_ID)
@dataclass_options(
    train=TrainConfig,
    dora=DoRAConfig,
    preference=PreferenceConfig,
    reward=RewardConfig,
    exclude=_HIDDEN,
)
@click.option(
    "--rows",
    type=click.IntRange(min=0),
    default=3,
    cls=GroupedOption,
    group="Reports",
    help="Rows to show per split.",
)
@click.option(
    "--html",
    type=FILE,
    cls=GroupedOption,
    group="Reports",
    help="Write a self-contained HTML page.",
)
@json_option(group="Reports")
@overwrite_option("Replace existing files.")
def command(
    data: str,
    train: TrainConfig,
    dora: DoRAConfig,
    preference: PreferenceConfig,
    reward: RewardConfig,
    rows: int,
    html: Path | None,
    json_output: JsonOutput,
    overwrite: bool,
) -> None:
    """Show what would be trained from DATA: a folder, a file or a Hub data set.

    Marks the tokens that count in the loss, draws a histogram of the lengths, lists the
    rows that are cut, skipped or in two splits, suggests flags of mlx_dora.train that
    fit this machine, and says which well-known models would. Loads only the tokenizer
    of --model.
    """
    if train.model is None:
        raise click.UsageError("give --model, whose tokenizer reads the rows")
    note(f"Reading {data} ...")
    from mlx_dora.io.atomic import write_text
    from mlx_dora.io.output import check_output_file
    from mlx_dora.train.plan.preview import preview_training, render_preview

    inputs = (data, train.model)
    json_output.check(*inputs)
    if html is not None:
        used = (*inputs, json_output.file)
        check_output_file(html, inputs=used, overwrite=overwrite)
    preview = preview_training(
        dataclasses.replace(train, data=data),
        dora,
        samples=rows,
        preference=preference,
        reward=reward,
    )
    if str(json_output) != STDOUT:
        show_preview(preview)
    json_output.write(preview.to_dict())
    if html is not None:
        write_text(html, render_preview(preview, command_line()))
        echo(f"Saved {html}")


command.epilog = "Formats of rows, by their columns: " + "; ".join(
    f"{f.title} ({', '.join(f.required(DataConfig()))})" for f in FORMATS
)
