"""A complete training job: loads model and data, trains, tests and plots."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_dora.adapters.attach import all_problems, attach_adapter
from mlx_dora.adapters.config import DoRAConfig
from mlx_dora.adapters.files import read_adapter
from mlx_dora.adapters.hosting import load, model_folder
from mlx_dora.adapters.sharding import PendingDivision, load_sharded
from mlx_dora.adapters.tensor import share_squares
from mlx_dora.data.loading import make_datasets
from mlx_dora.data.splits import read_splits
from mlx_dora.errors import DoRAError
from mlx_dora.layers import has_divided
from mlx_dora.progress import Progress
from mlx_dora.train.config import TrainConfig
from mlx_dora.train.group import PEER_LOST, row_group, together
from mlx_dora.train.grpo.config import RewardConfig
from mlx_dora.train.objectives.config import PreferenceConfig
from mlx_dora.train.objectives.make import make_objective
from mlx_dora.train.objectives.objective import Measured, Objective
from mlx_dora.train.optimizers import build_optimizer
from mlx_dora.train.peers import watched_peers
from mlx_dora.train.plot import PLOT_NAME, can_plot, plot_losses
from mlx_dora.train.run.finetune import finetune
from mlx_dora.train.run.journal import StepReport, TrainReport
from mlx_dora.train.run.run import measure
from mlx_dora.train.run.start import check_folder
from mlx_dora.train.services import HostCallback, check_services
from mlx_dora.train.sharded import divide_for_tensors, finish

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class JobResult:
    """Results of a training job.

    Args:
        train: Report of the training; None if there was only a test.
        test: The objective on the test set; None without a test.
        plot: Path of the loss plot; None without matplotlib or training.
        splits: Names of the data sets that were read and have rows.
        chats: Whether the model has a chat template.
    """

    train: TrainReport | None
    test: Measured | None
    plot: Path | None
    splits: tuple[str, ...] = ()
    chats: bool = False


def run_job(
    train: TrainConfig,
    dora: DoRAConfig,
    *,
    preference: PreferenceConfig | None = None,
    reward: RewardConfig | None = None,
    callback: Callable[[StepReport], None] | HostCallback | None = None,
    progress: Progress | None = None,
) -> JobResult:
    """Run the job of the command ``mlx_dora.train``: train, test, or both.

    If only ``test`` is set, the adapter at ``adapter_path`` is tested, or the plain
    model if that path is empty.

    Every process of an `mx.distributed` group (``mlx.launch``) must make the same call.

    Args:
        train: Settings of the training; names model, data and adapter folder.
        dora: Settings of the adapter.
        preference: Settings of the objectives dpo, orpo, kto and simpo.
        reward: Settings of the objective grpo.
        callback: Called with each report, or an mlx-lm ``TrainingCallback``.
        progress: Called after every step and during validations and the test.

    Raises:
        DoRAError: If a setting, the model or the data is invalid; nothing is written.
        KeyboardInterrupt: After Ctrl-C, once the step is done and the adapter is saved.
    """
    group = mx.distributed.init()
    with watched_peers(group) as ended:
        try:
            objective = make_objective(train, preference, reward=reward)
            return _run(train, dora, objective, group, callback, progress)
        except RuntimeError as error:
            if group.size() == 1 or PEER_LOST not in str(error):
                raise
            ranks = ", ".join(map(str, ended()))
            what = f"process {ranks}" if ranks else "another process"
            raise DoRAError(
                f"{what} of this training has ended ({error}): see its output; "
                "--resume continues from the last checkpoint."
            ) from error


def _run(
    train: TrainConfig,
    dora: DoRAConfig,
    objective: Objective,
    group: mx.distributed.Group,
    callback: Callable[[StepReport], None] | HostCallback | None,
    progress: Progress | None,
) -> JobResult:
    folder = Path(train.adapter_path).expanduser()
    with together(group):
        objective.check(train, dora)
        model, tokenizer, data = _load(train, objective, folder, group)
    if isinstance(model, PendingDivision):
        model = finish(model)
    elif has_divided(model):
        share_squares(model)
    if has_divided(model) and not train.trains and train.adapter_path:
        with together(group):
            adapter = read_adapter(folder)
            if problems := all_problems(model, adapter, check_base=True):
                raise DoRAError(f"{folder} does not fit: {'; '.join(problems)}.")
        attach_adapter(model, adapter, name=str(folder))
        model.eval()
    report, plot = None, None
    if train.trains:
        report = finetune(
            model,
            tokenizer,
            data["train"],
            data["valid"],
            train=train,
            dora=dora,
            adapter_path=folder,
            callback=callback,
            progress=progress,
            objective=objective,
        )
        with together(group):
            if can_plot() and group.rank() == 0:
                plot = folder / PLOT_NAME
                plot_losses(report.history, plot)
    test = None
    if train.test:
        test_set = objective.limited(data["test"], train.max_seq_length)
        if not train.trains:
            objective.adapting(model)
        rows = row_group(group, train.shard)
        test = measure(objective, model, test_set, train, "test", progress, rows)
    return JobResult(
        train=report,
        test=test,
        plot=plot,
        splits=tuple(name for name, rows in data.items() if rows is not None),
        chats=bool(getattr(tokenizer, "has_chat_template", False)),
    )


def _load(
    train: TrainConfig,
    objective: Objective,
    folder: Path,
    group: mx.distributed.Group,
) -> tuple[Any, Any, Any]:
    """Load model, tokenizer and data; quick checks precede the slow loading.

    With ``shard`` on several processes, the model is a `PendingDivision`.
    """
    if train.model is None:
        raise DoRAError("model is not given: name a folder or a Hugging Face id.")
    if not train.trains and not train.test:
        raise DoRAError("nothing to do: neither train nor test is set.")
    names = ["train", "valid"] * train.trains + ["test"] * train.test
    tested = train.adapter_path if train.adapter_path and not train.trains else None
    if train.trains:
        if not train.adapter_path:
            raise DoRAError("adapter_path is empty: name a folder for the adapter.")
        if group.rank() == 0:
            data = train.data if train.hf_dataset is None else None
            check_folder(folder, train, inputs=(data,))
            check_services(train)
        build_optimizer(train)
    elif tested is not None:
        _check_tested(tested)
    splits = read_splits(train, names)
    for name in names:
        if splits[name]:
            continue
        if name != "valid":
            raise DoRAError(f"{train.data} has no {name} data.")
        logger.warning("there is no validation data: training without validation")
    model_folder(train.model)
    trust = train.trust_remote_code
    if train.shard == "full" and group.size() > 1:
        model, tokenizer = load_sharded(train.model, group, trust_remote_code=trust)
    elif train.shard and group.size() > 1:
        model, tokenizer = load(train.model, lazy=True, trust_remote_code=trust)
        divide_for_tensors(model, group)
    else:
        model, tokenizer = load(train.model, tested, trust_remote_code=trust)
    return model, tokenizer, make_datasets(splits, tokenizer, objective.dataset)


def _check_tested(path: str) -> None:
    try:
        read_adapter(path)
    except DoRAError as error:
        raise DoRAError(
            f"{error} (test without train evaluates an existing adapter; set train too "
            "to make an adapter first)"
        ) from error
