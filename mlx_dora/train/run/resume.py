"""Starts a run from its newest checkpoint, from saved weights, or from step 0."""

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
    """Set the starting state of a prepared run, its stepper and its batches.

    A run that starts at step 0 deletes the folder's checkpoints, after all checks have
    passed.

    Raises:
        DoRAError: If the checkpoint belongs to another training, the checkpoint or the
            weights to start from do not fit, or no row has a target.
    """
    with run.together():
        checkpoint = _newest(run) if run.is_writer else None
        if checkpoint is not None:
            check_settings(checkpoint, run.settings, force=run.train.force)
            restore(checkpoint, run.model, run.optimizer)
            run.journal.restore(run.folder, checkpoint.state.log_bytes)
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
        run.kernels = state["kernels"]
        with run.together():
            run.objective.restore(state["objective"])
    if checkpoint is not None:
        _describe(run)
    with run.together():
        run.source, *held_out = run.feed.streams(run.step, run.rows)
        run.stepper = run.make_stepper(held_out)
        if run.is_writer and not state:
            discard_checkpoints(run.folder)


def _describe(run: Run) -> None:
    """Log from where the run is resumed, or that nothing is left to do."""
    step, iters = run.step, run.train.iters
    if step < iters and run.best.is_enough:
        logger.info("already finished: stopped early at step %d (early_stop)", step)
    elif step < iters:
        logger.info("Resuming from step %d of %d", step, iters)
    elif step == iters:
        logger.info(
            "already finished: %d of %d steps; raise --iters to continue", step, iters
        )
    else:
        logger.info(
            "already finished: %d steps, more than --iters %d; raise it to continue",
            step,
            iters,
        )


def _newest(run: Run) -> Checkpoint | None:
    """The checkpoint to resume from; None to start at step 0."""
    discard_fragments(run.folder)
    if not run.train.resume:
        return None
    checkpoint = newest_checkpoint(run.folder, multiple_of=run.block)
    if checkpoint is None:
        logger.warning("%s has no checkpoint: training starts at step 0", run.folder)
    return checkpoint
