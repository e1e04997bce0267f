"""A look at a training before it runs: its rows, its memory, and models that fit."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mlx_dora.adapters.config import DoRAConfig
from mlx_dora.adapters.hosting import load_tokenizer
from mlx_dora.data.loading import load_datasets
from mlx_dora.data.survey import Survey, take_survey
from mlx_dora.errors import DoRAError
from mlx_dora.page import name_of, provenance, render_page
from mlx_dora.train.config import TrainConfig
from mlx_dora.train.grpo.config import RewardConfig
from mlx_dora.train.objectives.config import PreferenceConfig
from mlx_dora.train.objectives.make import make_objective
from mlx_dora.train.plan.hub_models import HubModel, fitting_models
from mlx_dora.train.plan.predict import memory_limit, plan_memory
from mlx_dora.train.plan.step import MemoryPlan

_SCRIPT = Path(__file__).with_name("preview.js")
_LARGEST_BATCH = 32  # of a suggestion


@dataclass(frozen=True, kw_only=True)
class Preview:
    """What a training would read and need.

    Args:
        data: Name of the data.
        model: Name of the model, whose tokenizer counts the tokens.
        survey: What would be trained.
        limit: Bytes that MLX may use on this machine.
        plan: Memory of a training that cuts no row; None if the model has no plan.
        problem: Why the model has no plan.
        flags: Flags of ``mlx_dora.train`` that suit the data and fit this machine.
        models: Well-known models, and whether they fit.
    """

    data: str
    model: str
    survey: Survey
    limit: int
    plan: MemoryPlan | None
    problem: str | None
    flags: tuple[str, ...]
    models: tuple[HubModel, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values, with histograms of the lengths."""
        survey = {
            "max_seq_length": self.survey.max_seq_length,
            "splits": [split.to_dict() for split in self.survey.splits],
            "repeats": [asdict(repeat) for repeat in self.survey.repeats],
        }
        plan = None
        if self.plan is not None:
            plan = {**asdict(self.plan), "fits": self.plan.fits}
        return {
            "data": self.data,
            "model": self.model,
            "survey": survey,
            "limit": self.limit,
            "plan": plan,
            "problem": self.problem,
            "flags": list(self.flags),
            "models": [asdict(model) for model in self.models],
        }


def preview_training(
    train: TrainConfig,
    dora: DoRAConfig,
    *,
    samples: int = 3,
    limit: int | None = None,
    preference: PreferenceConfig | None = None,
    reward: RewardConfig | None = None,
) -> Preview:
    """Show what would be trained, without loading weights.

    Args:
        train: Settings of the training; names model and data.
        dora: Settings of the adapter.
        samples: Number of rows to show per split.
        limit: Bytes to fit into; default: this machine's limit.
        preference: Settings of the objectives dpo, orpo, kto and simpo.
        reward: Settings of the objective grpo.

    Raises:
        DoRAError: If the model or the data does not exist, or a row is malformed.
    """
    if train.model is None:
        raise DoRAError("model is not given: name a folder or a Hugging Face id.")
    limit = memory_limit() if limit is None else limit
    objective = make_objective(train, preference, reward=reward)
    objective.check(train, dora)
    tokenizer = load_tokenizer(train.model, trust_remote_code=train.trust_remote_code)
    survey = take_survey(
        load_datasets(train, tokenizer, make=objective.dataset),
        tokenizer,
        max_seq_length=train.max_seq_length,
        samples=samples,
        unit=objective.unit or 1,
    )
    sizes = survey.splits[0].trained.lengthened(objective.added_tokens)
    longest = max(sizes.lengths, default=8)
    whole = replace(train, max_seq_length=max(8 * -(-longest // 8), 8))
    plan, problem, flags = None, None, ()
    try:
        plan = plan_memory(whole, dora, limit=limit, lengths=sizes, objective=objective)
        flags = _suggest(whole, plan)
    except DoRAError as error:
        problem = str(error)
    return Preview(
        data=train.data,
        model=train.model,
        survey=survey,
        limit=limit,
        plan=plan,
        problem=problem,
        flags=flags,
        models=tuple(
            fitting_models(train, dora, sizes, limit, objective.rows_per_unit)
        ),
    )


def _suggest(whole: TrainConfig, plan: MemoryPlan) -> tuple[str, ...]:
    """Flags that cut no row where memory allows, with a batch that is a power of 2."""
    length = f"--max-seq-length {whole.max_seq_length}"
    if not plan.fits:
        is_cut = any(flag.startswith("--max-seq-length") for flag in plan.advice)
        return plan.advice if is_cut else (length, *plan.advice)
    rows = min(plan.largest_batch, plan.rows or 1, _LARGEST_BATCH)
    return length, f"--batch-size {1 << (rows.bit_length() - 1)}"


def render_preview(preview: Preview, command: Sequence[str] = ()) -> str:
    """Return the preview as a self-contained HTML page, without local folders.

    Args:
        preview: The preview.
        command: The words of the command that makes the page, if any.
    """
    content = preview.to_dict()
    survey = content["survey"]
    for split in survey["splits"]:
        for entry in (*split["notes"], *split["samples"]):
            entry["where"] = _without_folder(entry["where"])
    for repeat in survey["repeats"]:
        for key in ("first", "second"):
            repeat[key] = _without_folder(repeat[key])
    content |= {
        "data": name_of(preview.data),
        "model": name_of(preview.model),
        "provenance": provenance(command),
    }
    return render_page("mlx_dora data", content, _SCRIPT)


def _without_folder(where: str) -> str:
    source, comma, place = where.rpartition(", ")
    return f"{name_of(source)}{comma}{place}"
