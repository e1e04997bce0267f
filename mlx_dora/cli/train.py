"""``mlx_dora.train``: fine-tunes a model, with the options of ``mlx_lm.lora``."""

import logging
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_dora.adapters.config import DoRAConfig
from mlx_dora.cli._base_model import announced_base
from mlx_dora.cli._config_file import config_file_option
from mlx_dora.cli._echo import echo, note, show_command
from mlx_dora.cli._framework import EXIT_BAD_INPUT, exit_code_of, verb
from mlx_dora.cli._help import GroupedOption
from mlx_dora.cli._json import JsonOutput, json_option
from mlx_dora.cli._objectives import SHARED, shared_settings
from mlx_dora.cli._options import dataclass_options
from mlx_dora.cli._progress import TrainDisplay
from mlx_dora.cli._publish import check_repo, command_line, publish, publish_options
from mlx_dora.cli._train_text import (
    describe_plan,
    describe_start,
    describe_test,
    describe_training,
    next_commands,
    resume_command,
)
from mlx_dora.data.config import hub_entries
from mlx_dora.train.config import TrainConfig
from mlx_dora.train.grpo.config import RewardConfig
from mlx_dora.train.objectives.config import PreferenceConfig

if TYPE_CHECKING:
    from mlx_dora.train.job import JobResult

HOST_DEFAULT_MODEL = "Qwen/Qwen3-0.6b"


@verb(
    "train",
    examples=(
        "mlx_dora.train --model MODEL --data FOLDER --mask-prompt --iters 300",
        "mlx_dora.train -c lora.yaml --plan",
    ),
)
@config_file_option
@dataclass_options(
    train=TrainConfig,
    dora=DoRAConfig,
    preference=PreferenceConfig,
    reward=RewardConfig,
    exclude=SHARED,
)
@click.option(
    "--plan",
    is_flag=True,
    cls=GroupedOption,
    group="Common options",
    help="Predict the memory that training needs, and exit.",
)
@click.option(
    "--processes",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    cls=GroupedOption,
    group="Common options",
    help="With --plan: plan for one of this many processes of mlx.launch, with the "
    "bytes that it sends.",
)
@json_option(group="Reports")
@publish_options
def command(
    train: TrainConfig,
    dora: DoRAConfig,
    preference: PreferenceConfig,
    reward: RewardConfig,
    plan: bool,
    processes: int,
    card: bool,
    json_output: JsonOutput,
    upload_repo: str | None,
) -> int | None:
    """Fine-tune a model with DoRA (or LoRA, or in full).

    Accepts the flags and YAML files of mlx_lm.lora; trains by default.

    The data is a folder, a file or a data set on the Hugging Face Hub; mlx_dora.data
    lists the formats and shows what would be trained. The adapter's folder receives
    adapters.safetensors and adapter_config.json, which mlx-lm loads, log.jsonl, and
    loss.png if matplotlib is installed. On Ctrl-C, SIGTERM or SIGHUP, the command
    finishes the step, saves, and exits with 130, 143 or 129.
    """
    json_output.check(train.model, train.data)
    preference, reward = shared_settings(train, preference, reward)
    train = replace(train, model=train.model or _default_model(train))
    if processes > 1 and not plan:
        raise click.UsageError(
            "--processes is for --plan; start a training on several processes with "
            "mlx.launch."
        )
    if plan:
        for line in describe_start(train, dora)[:2]:  # all but the legend of reports
            note(line)
        from mlx_dora.train.plan.predict import plan_memory

        predicted = plan_memory(
            train, dora, preference=preference, reward=reward, processes=processes
        )
        json_output.write({"plan": asdict(predicted)})
        for line in describe_plan(predicted):
            echo(line)
        return None
    import mlx.core as mx

    if mx.distributed.init().rank() > 0:
        return _work_in_silence(train, dora, preference, reward)
    check_repo(upload_repo)
    if train.trains:
        for line in describe_start(train, dora):
            note(line)
    result = _run(train, dora, preference, reward)
    _describe(result, train)
    json_output.write(_values(result))
    if result.train is not None:
        if card or upload_repo is not None:
            _publish_adapter(train, upload_repo)
        echo("Next:")
        is_sft = train.objective == "sft"  # evaluate reads examples
        evaluates = is_sft and bool({"valid", "test"} & set(result.splits))
        for line in next_commands(train, chats=result.chats, evaluates=evaluates):
            show_command(line)
    return None


def _default_model(train: TrainConfig) -> str:
    """The base of an adapter that exists already, or else mlx-lm's default."""
    continues = train.resume or not train.trains
    if continues and Path(train.adapter_path, "adapter_config.json").exists():
        return announced_base(train.adapter_path)
    note(f"No model given: using mlx-lm's default, {HOST_DEFAULT_MODEL}.")
    return HOST_DEFAULT_MODEL


def _run(
    train: TrainConfig,
    dora: DoRAConfig,
    preference: PreferenceConfig,
    reward: RewardConfig,
) -> "JobResult":
    from mlx_dora.train.job import run_job
    from mlx_dora.train.run.checkpoint import has_checkpoints

    display = TrainDisplay(train.iters if train.epochs is None else None)
    try:
        with display:
            return run_job(
                train,
                dora,
                preference=preference,
                reward=reward,
                callback=display.report,
                progress=display.progress,
            )
    except KeyboardInterrupt:
        if has_checkpoints(Path(train.adapter_path).expanduser()):
            echo("To resume:", err=True)
            show_command(resume_command(command_line()), err=True)
        raise


def _describe(result: "JobResult", train: TrainConfig) -> None:
    """Print the result of the job."""
    if result.train is not None:
        for line in describe_training(result.train):
            echo(line)
        if result.plot is not None:
            echo(f"Loss plot: {result.plot}")
        else:
            echo("No loss plot: pip install matplotlib to get one.")
    if result.test is not None:
        echo(describe_test(result.test, train))


def _values(result: "JobResult") -> dict[str, Any]:
    train, test = result.train, result.test
    return {
        "train": train
        and {
            **asdict(train),
            "history": [report.to_dict() for report in train.history],
        },
        "test": test and {**asdict(test), "perplexity": test.perplexity},
        "plot": result.plot,
    }


def _publish_adapter(train: TrainConfig, repo: str | None) -> None:
    from mlx_dora.publish.card import adapter_card

    entries = hub_entries(train.hf_dataset)
    data = [entry["path"] for entry in entries] or [train.data]
    folder, base = train.adapter_path, str(train.model)
    publish(folder, adapter_card(folder, base, command_line(), data, repo), repo)


def _work_in_silence(
    train: TrainConfig,
    dora: DoRAConfig,
    preference: PreferenceConfig,
    reward: RewardConfig,
) -> int:
    """Train in a process other than the first, which prints for all processes."""
    from mlx_dora.train.group import SharedError
    from mlx_dora.train.job import run_job

    logging.getLogger("mlx_dora").setLevel(logging.ERROR)
    try:
        run_job(train, dora, preference=preference, reward=reward)
    except SharedError:
        return EXIT_BAD_INPUT
    except KeyboardInterrupt as interrupt:
        return exit_code_of(interrupt)
    return 0
