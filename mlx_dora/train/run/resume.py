"""Where a run starts: its newest checkpoint, the weights of another run, or step 0."""

import logging
from dataclasses import asdict

from mlx_dora.train.group import share
from mlx_dora.train.run.checkpoint import (
    Checkpoint,
    discard_checkpoints,
    discard_fragments,
    newest_checkpoint,
)
from mlx_dora.train.run.journal import StepReport
from mlx_dora.train.run.meter import Meter
from mlx_dora.train.run.restore import restore, share_start
from mlx_dora.train.run.run import Run
from mlx_dora.train.run.settings import check_settings
from mlx_dora.train.run.start import load_weights

logger = logging.getLogger(__name__)


def resume(run: Run) -> None:
    """Bring a prepared run to where it starts, and give it its stepper and batches.

    A run that does not continue an earlier run deletes the folder's checkpoints, once
    nothing can be wrong any more.

    Raises:
        DoRAError: If the checkpoint is of another training or does not fit, the weights
            to start from do not fit, or no row has a target.
    """
    with run.together():
        checkpoint = _newest(run) if run.is_writer else None
        if checkpoint is not None:
            check_settings(checkpoint, run.settings, force=run.train.force)
            restore(checkpoint, run.model, run.optimizer)
            run.journal.restore(run.folder, checkpoint.state.log_bytes)
            logger.info("resuming from %s", checkpoint.path)
        elif run.is_writer and run.train.resume_adapter_file is not None:
            load_weights(run.model, run.train.resume_adapter_file)
    share_start(run.model, run.optimizer, run.group)
    state = share(checkpoint and asdict(checkpoint.state), run.group)
    history = share([asdict(report) for report in run.journal.history], run.group)
    run.journal.history = [StepReport(**report) for report in history]
    run.meter = Meter()
    if state:
        run.step = state["step"]
        run.meter.restore(state["meter"])
        run.guard.restore(state["guard"])
        run.best.restore(state["best"])
    with run.together():
        run.source, *held_out = run.feed.streams(run.step, run.group)
        run.stepper = run.make_stepper(held_out)
        if run.is_writer and not state:
            discard_checkpoints(run.folder)


def _newest(run: Run) -> Checkpoint | None:
    """The checkpoint to resume from; None to begin at step 0."""
    discard_fragments(run.folder)
    if not run.train.resume:
        return None
    checkpoint = newest_checkpoint(
        run.folder, multiple_of=run.train.grad_accumulation_steps
    )
    if checkpoint is None:
        logger.warning("%s has no checkpoint: training starts at step 0", run.folder)
    return checkpoint
