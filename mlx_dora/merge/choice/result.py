"""What was tried on the way to a merge, and what was chosen."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlx_dora.errors import DoRAError, printable
from mlx_dora.merge.choice.candidates import Candidate
from mlx_dora.notebook import Shown

_LEAST_SCALE = 0.01
"""Least possible gain of a task, as a share of the base's loss."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A candidate and what came of it.

    Attributes:
        candidate: The method and its settings.
        losses: Loss on each task, in order; empty if it failed.
        error: Why it failed; empty if it did not.
    """

    candidate: Candidate
    losses: tuple[float, ...] = ()
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class TaskRows:
    """The rows on which a task was measured.

    Attributes:
        name: The data set.
        split: ``"valid"``, ``"test"`` or ``"train"``.
        rows: Number of rows.
        tokens: Number of target tokens.
    """

    name: str
    split: str
    rows: int
    tokens: int


@dataclass(frozen=True, kw_only=True, repr=False)
class MergeChoice(Shown):
    """Candidates tried on rows of each task, and the best of them.

    Attributes:
        adapters: Short names of the adapters.
        tasks: The tasks, in order.
        base: The base's loss on each task.
        alone: For each adapter, its own loss on each task.
        trials: All candidates, in the order in which they were tried.
    """

    adapters: tuple[str, ...]
    tasks: tuple[TaskRows, ...]
    base: tuple[float, ...]
    alone: tuple[tuple[float, ...], ...]
    trials: tuple[Trial, ...]

    def shares(self, losses: Sequence[float]) -> list[float]:
        """Return each task's gain over the base, as a share of the possible gain.

        The possible gain is that of the best single adapter on the task, and at least
        a hundredth of the base's loss.
        """
        possible = [
            max(base - min(own), _LEAST_SCALE * base)
            for base, own in zip(self.base, zip(*self.alone, strict=True), strict=True)
        ]
        return [
            (base - loss) / most
            for base, loss, most in zip(self.base, losses, possible, strict=True)
        ]

    def score(self, trial: Trial) -> float:
        """Return the worst task's share of its possible gain."""
        return min(self.shares(trial.losses))

    @property
    def best(self) -> Trial:
        """The trial with the best score; among equals, the first.

        Raises:
            DoRAError: If every candidate failed.
        """
        done = [trial for trial in self.trials if not trial.error]
        if not done:
            reasons = "; ".join(
                f"{trial.candidate.name}: {trial.error}" for trial in self.trials
            )
            raise DoRAError(f"no candidate could be merged: {reasons}")
        return max(done, key=self.score)

    @property
    def worse(self) -> list[int]:
        """Indices of the tasks on which the best trial's loss is above the base's."""
        pairs = zip(self.best.losses, self.base, strict=True)
        return [i for i, (loss, base) in enumerate(pairs) if loss > base]

    def worst_task(self, trial: Trial) -> int:
        """Return the index of the task with the least share of its possible gain."""
        shares = self.shares(trial.losses)
        return shares.index(min(shares))

    def lines(self) -> list[str]:
        """The table of what was tried, and the choice."""
        headers = [task.name for task in self.tasks]
        names = [
            "base",
            *(f"{name} alone" for name in self.adapters),
            *(trial.candidate.name for trial in self.trials),
        ]
        wide = max(map(len, [*names, "loss on"]))
        columns = [max(len(name), 7) for name in headers]

        def row(name: str, cells: Sequence[str], last: str) -> str:
            padded = zip(cells, columns, strict=True)
            text = "  ".join(f"{cell:>{width}}" for cell, width in padded)
            return printable(f"{name:<{wide}}  {text}  {last}".rstrip())

        def values(losses: Sequence[float]) -> list[str]:
            return [f"{loss:.4f}" for loss in losses]

        text = [
            "Tried on "
            + "; ".join(
                f"{task.rows} {task.split} rows of {task.name} "
                f"({task.tokens:,} targets)"
                for task in self.tasks
            )
            + ".",
            row("loss on", headers, "worst task's share of the possible gain"),
            row("base", values(self.base), ""),
        ]
        for name, losses in zip(self.adapters, self.alone, strict=True):
            text.append(row(f"{name} alone", values(losses), ""))
        for trial in self.trials:
            if trial.error:
                text.append(printable(f"{trial.candidate.name}: {trial.error}"))
                continue
            share = f"{self.score(trial):.0%}"
            text.append(row(trial.candidate.name, values(trial.losses), share))
        if failed := sum(bool(trial.error) for trial in self.trials):
            text.append(f"{failed} of {len(self.trials)} candidates failed.")
        return [*text, printable(f"Chosen: {self.best.candidate.name}")]

    def warnings(self) -> list[str]:
        """A sentence for each task on which the choice is worse than the base."""
        return [
            printable(
                f"the chosen merge has a loss of {self.best.losses[i]:.4f} on "
                f"{self.tasks[i].name}, above the base's {self.base[i]:.4f}; no "
                "candidate does better by its worst task: keep these adapters apart"
            )
            for i in self.worse
        ]

    def facts(self) -> dict[str, Any]:
        """Return the choice and its score."""
        return {
            "chosen": self.best.candidate.name,
            "worst share": self.score(self.best),
            "tried": len(self.trials),
        }

    def table(self) -> list[dict[str, Any]]:
        """Return the trials that did not fail, with the loss on each task."""
        return [
            {
                "candidate": trial.candidate.name,
                **{
                    task.name: loss
                    for task, loss in zip(self.tasks, trial.losses, strict=True)
                },
                "worst share": self.score(trial),
            }
            for trial in self.trials
            if not trial.error
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "adapters": list(self.adapters),
            "tasks": [vars(task) for task in self.tasks],
            "base": list(self.base),
            "alone": [list(losses) for losses in self.alone],
            "trials": [
                {
                    **trial.candidate.to_dict(),
                    "losses": list(trial.losses),
                    "worst_share": None if trial.error else self.score(trial),
                    "error": trial.error or None,
                }
                for trial in self.trials
            ],
            "chosen": self.best.candidate.to_dict(),
            "above_base": [self.tasks[i].name for i in self.worse],
        }
