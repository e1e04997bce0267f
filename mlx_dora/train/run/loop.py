"""The training loop.

`stepper` computes an update; `run` writes reports, checkpoints and the adapter.
"""

from itertools import islice

from mlx_dora.train.gated_delta import fused_delta
from mlx_dora.train.group import greatest
from mlx_dora.train.memory import trim_cache, wired_memory
from mlx_dora.train.recompute import recomputed_blocks
from mlx_dora.train.run.interrupt import delayed_interrupt
from mlx_dora.train.run.run import Run
from mlx_dora.train.run.start import train_mode
from mlx_dora.train.stepper import is_due, seed_step


def loop(run: Run) -> int:
    """Train to the last step, to an early stop, or until interrupted.

    Writes the adapter at the end and leaves the model in eval mode.

    Returns:
        Number of the signal that interrupted any of the processes; 0 for none.

    Raises:
        DoRAError: If memory was about to end, once the checkpoint is written.
    """
    with (
        wired_memory(),
        fused_delta(),
        train_mode(run.model),
        recomputed_blocks(run.model, run.train.grad_checkpoint),
        delayed_interrupt() as stopped,
    ):
        if run.progress is not None and run.step:
            run.progress("train", run.train.iters, min(run.step, run.train.iters))
        # The second case: the run was interrupted in this validation.
        if run.step == 0 or _evaluates(run, run.step - _window(run)):
            run.validate(stopped)
        interrupted, is_full = greatest(stopped(), run.group), 0
        if interrupted and run.step == 0:
            return interrupted  # nothing to save
        while run.step < run.train.iters and not (
            interrupted or is_full or run.best.is_enough
        ):
            before = run.step
            _update(run)
            saves = is_due(run.train.save_every, before, run.step)
            if saves or is_due(run.train.steps_per_report, before, run.step):
                run.report(with_layers=saves)
            if _evaluates(run, before):
                run.validate(stopped)
            interrupted = greatest(stopped(), run.group)
            is_full = greatest(int(run.watch.is_full), run.group)
            # Checkpoint before the final report, so that a resumed, longer run writes
            # the same log.
            ends = interrupted or run.best.is_enough or run.step >= run.train.iters
            if saves or ends or is_full:
                run.checkpoint()
            if saves:
                run.save(run.folder)
        if not run.journal.has("learning_rate", run.step):
            run.report(with_layers=True)
        if not (interrupted or is_full):
            run.validate(stopped)
            interrupted = greatest(stopped(), run.group)
        run.save(run.folder, warn=True)
    with run.together():
        if is_full and run.step < run.train.iters:
            raise run.watch.error(run.step, run.folder)
    return interrupted


def _window(run: Run) -> int:
    """Number of batches of the update before this step."""
    return min(run.train.grad_accumulation_steps, run.step)


def _update(run: Run) -> None:
    """Update the weights once, from a window of batches."""
    train, before = run.train, run.step
    count = min(train.grad_accumulation_steps, train.iters - before)
    window = list(islice(run.source, count))
    run.meter.start_step()
    seed_step(train.seed, before, run.rows.rank())
    run.step = before + len(window)
    gradient = run.stepper.gradient(window)
    with run.together():
        passes = run.guard.passes(
            run.step, gradient.loss, gradient.norm, gradient.count
        )
    if passes:
        run.stepper.apply(gradient)
        run.stepper.after_update(gradient, before, run.step)
        run.meter.add(gradient)
    run.meter.end_step(len(window))
    trim_cache(train.clear_cache_threshold)
    run.watch.look(window)
    if run.progress is not None:
        run.progress("train", train.iters, len(window))


def _evaluates(run: Run, before: int) -> bool:
    if run.epoch_ends is None:
        return is_due(run.train.steps_per_eval, before, run.step)
    return any(before < end <= run.step for end in run.epoch_ends)
