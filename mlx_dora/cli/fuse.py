"""``mlx_dora.fuse``: fuses an adapter into its base model."""

from dataclasses import replace
from typing import Any

import click

from mlx_dora.cli._base_model import announced_base, check_base_option
from mlx_dora.cli._echo import echo, note
from mlx_dora.cli._framework import verb
from mlx_dora.cli._json import JsonOutput, json_option, overwrite_option
from mlx_dora.cli._options import dataclass_options
from mlx_dora.cli._paths import PATH, PATH_OR_ID
from mlx_dora.cli._progress import WorkDisplay
from mlx_dora.cli._publish import check_repo, command_line, publish, publish_options
from mlx_dora.cli._report import show_report
from mlx_dora.evaluate.tolerance import FuseTolerance
from mlx_dora.fuse.config import FuseConfig

EXIT_NOT_VERIFIED = 3


@verb(
    "fuse",
    examples=(
        "mlx_dora.fuse --adapter-path adapters --save-path fused_model",
        "mlx_dora.fuse --adapter-path adapters --mode lossless --verify",
    ),
)
@click.option(
    "--model",
    type=PATH_OR_ID,
    help="The base model: a local folder or Hub id; by default, the base that the "
    "adapter records.",
)
@click.option(
    "--adapter-path",
    type=PATH,
    default="adapters",
    show_default=True,
    help="The folder of the trained adapter.",
)
@click.option(
    "--save-path",
    type=PATH,
    default="fused_model",
    show_default=True,
    help="The folder to which the fused model is written.",
)
@dataclass_options(config=FuseConfig)
@click.option("--dequantize", is_flag=True, help="The same as --mode dequantize.")
@click.option(
    "--verify",
    is_flag=True,
    help="Run the unfused and the fused model on the same prompts and compare logits, "
    "loss and greedy tokens; exit code 3 if they differ too much.",
)
@click.option(
    "--prompt",
    "prompts",
    multiple=True,
    help="With --verify: a prompt to use instead of the built-in prompts; may be "
    "repeated.",
)
@dataclass_options(tolerance=FuseTolerance)
@click.option(
    "--export",
    "export_to",
    type=click.Choice(["gguf"]),
    help="Also write the fused model as model.gguf with a Modelfile for Ollama, by "
    "llama.cpp's converter (on the PATH, or in the folder that the variable LLAMA_CPP "
    "names); without it, show the command to type.",
)
@publish_options
@json_option()
@overwrite_option()
@check_base_option
@click.option(
    "--trust-remote-code",
    is_flag=True,
    help="Allow Python code in the model's folder to run.",
)
def command(
    model: str | None,
    adapter_path: str,
    save_path: str,
    config: FuseConfig,
    dequantize: bool,
    verify: bool,
    prompts: tuple[str, ...],
    tolerance: FuseTolerance,
    export_to: str | None,
    card: bool,
    upload_repo: str | None,
    json_output: JsonOutput,
    overwrite: bool,
    check_base: bool,
    trust_remote_code: bool,
) -> int:
    """Fuse an adapter (DoRA, LoRA or full fine-tuning) into its base model.

    Writes a folder that mlx-lm loads; the folder appears only when it is complete. Only
    one tensor is in memory at a time. A dense layer keeps its dtype and size. Reports
    what share of the update survived; -v shows each layer.
    """
    note(f"Fusing {adapter_path} ...")
    from mlx_dora.evaluate.fused import PROMPTS, verify_fused
    from mlx_dora.fuse.model import fuse_model

    check_repo(upload_repo)
    json_output.check(model, adapter_path, save_path)
    if model is None:
        model = announced_base(adapter_path)
    if dequantize:
        config = replace(config, mode="dequantize")
    if export_to is not None and config.mode != "dequantize":
        from mlx_dora.adapters.hosting import model_folder
        from mlx_dora.export.gguf_model import check_exportable

        check_exportable(model_folder(model))
    with WorkDisplay(with_memory=True) as display:
        report = fuse_model(
            model,
            adapter_path,
            save_path,
            config=config,
            overwrite=overwrite,
            check_base=check_base,
            trust_remote_code=trust_remote_code,
            progress=display.progress,
        )
    show_report(report, save_path)
    values = {**report.to_dict(), "save_path": save_path, "verified": None}
    if verify:
        checked = verify_fused(
            model,
            adapter_path,
            save_path,
            prompts=prompts or PROMPTS,
            tolerance=tolerance,
            check_base=check_base,
            trust_remote_code=trust_remote_code,
        )
        echo(checked.line())
        values["verified"] = checked
        if checked.problems:
            json_output.write(values)
            problems = "; ".join(checked.problems)
            echo(f"Error: not verified: {problems}", err=True)
            return EXIT_NOT_VERIFIED
    if export_to is not None:
        values["export"] = _exported(save_path)
    json_output.write(values)
    if card or upload_repo is not None:
        from mlx_dora.publish.card import fused_card

        text = fused_card(adapter_path, model, report, command_line(), upload_repo)
        publish(save_path, text, upload_repo)
    return 0


def _exported(save_path: str) -> dict[str, Any]:
    """Write the fused model as GGUF, or show how to."""
    from mlx_dora.export import fused_to_gguf

    done = fused_to_gguf(save_path)
    if done.path is not None:
        echo(f"Exported to {done.path}")
    else:
        echo("llama.cpp's converter is not installed here; type, in its folder:")
        echo(f"  {done.command}")
    path = None if done.path is None else str(done.path)
    return {"command": done.command, "path": path}
