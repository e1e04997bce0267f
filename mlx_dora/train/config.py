"""How a model is trained; mlx-lm's names and defaults.

Imports no MLX, so that the command line can make its options from the fields.
"""

import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from mlx_dora.errors import DoRAError
from mlx_dora.evaluate.config import DataConfig

Optimizer = Literal["adam", "adamw", "muon", "sgd", "adafactor"]
FineTuneType = Literal["dora", "lora", "full"]
SERVICES = ("wandb", "swanlab")

# Whole numbers and the least each may be.
_LEAST = {
    "seed": 0,
    "batch_size": 1,
    "iters": 1,
    "val_batches": -1,
    "steps_per_report": 1,
    "steps_per_eval": 1,
    "save_every": 1,
    "max_seq_length": 2,
    "grad_accumulation_steps": 1,
    "clear_cache_threshold": 0,
    "keep_last": 1,
    "early_stop": 0,
    "max_bad_steps": 1,
    "rank_every": 1,
    "rank_rounds": 0,
    "test_batches": -1,
}


# Inherits so that each option of the data exists once, here and for evaluation.
@dataclass(frozen=True, kw_only=True)
class TrainConfig(DataConfig):
    """Settings of one training, the adapter's own (`DoRAConfig`) apart.

    Field for field what ``mlx_lm.lora`` calls them, with the same defaults, but for
    ``fine_tune_type``, which is ``"dora"`` here. ``iters`` counts batches: with
    ``grad_accumulation_steps`` k the weights change at every k-th (and at the last).
    ``lora_plus_ratio`` is LoRA+ (arXiv:2402.12354); the magnitude keeps the plain rate.
    """

    model: str | None = field(
        default=None, metadata={"help": "Folder or Hugging Face id of the model."}
    )
    train: bool | None = field(
        default=None,
        metadata={"help": "Train; the default, unless only --test is asked for."},
    )
    fine_tune_type: FineTuneType = field(
        default="dora",
        metadata={
            "help": "What to train: a DoRA or LoRA adapter, or the blocks' own weights."
        },
    )
    optimizer: Optimizer = field(default="adam", metadata={"help": "Optimizer."})
    optimizer_config: dict[str, Any] | None = field(
        default=None,
        metadata={"help": "Settings by optimizer, as {adamw: {weight_decay: 0.1}}."},
    )
    seed: int = field(
        default=0,
        metadata={"help": "Seed of the adapter's start, the data order and dropout."},
    )
    batch_size: int = field(default=4, metadata={"help": "Rows in a batch."})
    iters: int = field(default=1000, metadata={"help": "Batches to train for."})
    epochs: int | None = field(
        default=None,
        metadata={"help": "Train for so many passes over the data, whatever iters is."},
    )
    packing: bool = field(
        default=False,
        metadata={
            "help": "Lay short examples end to end in rows of up to max_seq_length "
            "tokens, each seeing itself alone."
        },
    )
    val_batches: int = field(
        default=25,
        metadata={"help": "Batches of a validation; -1 for the whole set, 0 for none."},
    )
    learning_rate: float = field(
        default=1e-5, metadata={"help": "Learning rate, if there is no schedule."}
    )
    steps_per_report: int = field(
        default=10, metadata={"help": "Steps between reports of the loss."}
    )
    steps_per_eval: int = field(
        default=200, metadata={"help": "Steps between validations."}
    )
    epochs_per_eval: int | None = field(
        default=None,
        metadata={
            "help": "Validate after so many passes over the data, not steps_per_eval."
        },
    )
    resume_adapter_file: str | None = field(
        default=None,
        metadata={
            "help": "Start from these weights (adapters.safetensors, or its folder)."
        },
    )
    adapter_path: str = field(
        default="adapters", metadata={"help": "Folder of the adapter."}
    )
    save_every: int = field(
        default=100,
        metadata={"help": "Steps between writes of the adapter and a checkpoint."},
    )
    resume: bool = field(
        default=False,
        metadata={
            "help": "Go on from the newest checkpoint in the adapter's folder, exactly."
        },
    )
    force: bool = field(
        default=False,
        metadata={"help": "Resume even with settings that differ from then."},
    )
    keep_last: int = field(
        default=2, metadata={"help": "Checkpoints to keep, the newest ones."}
    )
    early_stop: int = field(
        default=0,
        metadata={
            "help": "Stop after so many validations without a better loss; 0 for never."
        },
    )
    max_grad_norm: float | None = field(
        default=None,
        metadata={"help": "Shorten the gradient of all parameters to this norm."},
    )
    max_bad_steps: int = field(
        default=10,
        metadata={
            "help": "Steps in a row that may be passed over, their loss or gradient "
            "not being finite, before the training stops."
        },
    )
    lora_plus_ratio: float = field(
        default=1.0,
        metadata={"help": "LoRA+: how many times the learning rate lora_b takes."},
    )
    rank_every: int = field(
        default=50,
        metadata={"help": "Variant adaptive: steps between re-allocations of ranks."},
    )
    rank_rounds: int = field(
        default=8, metadata={"help": "Variant adaptive: how many re-allocations."}
    )
    magnitude_share: float = field(
        default=0.2,
        metadata={
            "help": "Variant bidora: share of the training rows that train the "
            "magnitudes, and nothing else."
        },
    )
    test: bool = field(
        default=False,
        metadata={"help": "Measure the loss on the test set, after training."},
    )
    test_batches: int = field(
        default=500, metadata={"help": "Batches of the test; -1 for the whole set."}
    )
    max_seq_length: int = field(
        default=2048, metadata={"help": "Longer rows are cut to this many tokens."}
    )
    grad_checkpoint: bool = field(
        default=False,
        metadata={
            "help": "Recompute each block in the backward pass: less memory, more time."
        },
    )
    grad_accumulation_steps: int = field(
        default=1,
        metadata={"help": "Batches that make one update, averaged over their tokens."},
    )
    clear_cache_threshold: int = field(
        default=0,
        metadata={
            "help": "Free MLX's buffer cache after a step that leaves more bytes in it "
            "(2GB, 500MB).",
            "unit": "bytes",
        },
    )
    lr_schedule: dict[str, Any] | None = field(
        default=None,
        metadata={
            "help": "Schedule: name, arguments, warmup, warmup_init, as in mlx-lm."
        },
    )
    report_to: str | None = field(
        default=None, metadata={"help": "Report to wandb, swanlab or wandb,swanlab."}
    )
    project_name: str | None = field(
        default=None, metadata={"help": "Project for those services."}
    )
    trust_remote_code: bool = field(
        default=False,
        metadata={
            "help": "Let the model's and tokenizer's repository run its own code."
        },
    )
    overwrite: bool = field(
        default=False, metadata={"help": "Replace the adapter that is in the folder."}
    )

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            DoRAError: Naming the field, what is allowed and what came.
        """
        super().__post_init__()
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise DoRAError(
                    f"{name} must be a whole number of at least {least}, got {value!r}."
                )
        if self.seed >= 2**64:
            raise DoRAError(f"seed must be a whole number below 2^64, got {self.seed}.")
        for name in ("epochs", "epochs_per_eval"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise DoRAError(
                    f"{name} must be a whole number of at least 1, got {value!r}."
                )
        if self.test_batches == 0:
            raise DoRAError("test_batches must be -1 or at least 1, got 0.")
        rate = self.learning_rate
        if isinstance(rate, bool) or not isinstance(rate, int | float):
            raise DoRAError(f"learning_rate must be a number, got {rate!r}.")
        if not math.isfinite(rate) or rate <= 0:
            raise DoRAError(f"learning_rate must be above 0, got {rate!r}.")
        for name in ("max_grad_norm", "lora_plus_ratio"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise DoRAError(f"{name} must be above 0, got {value!r}.")
        share = self.magnitude_share
        if not isinstance(share, float) or not 0 < share < 1:
            raise DoRAError(
                f"magnitude_share must be above 0 and below 1, got {share!r}."
            )
        _check_choice("optimizer", self.optimizer, get_args(Optimizer))
        _check_choice("fine_tune_type", self.fine_tune_type, get_args(FineTuneType))
        for name in ("optimizer_config", "lr_schedule"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, dict):
                raise DoRAError(f"{name} must be a mapping, got {value!r}.")
        unknown = [one for one in self.services if one not in SERVICES]
        if unknown:
            known = " and ".join(SERVICES)
            raise DoRAError(f"report_to knows {known}, not {', '.join(unknown)}.")

    @property
    def services(self) -> tuple[str, ...]:
        """The services of `report_to`, in lower case."""
        parts = (self.report_to or "").split(",")
        return tuple(part.strip().lower() for part in parts if part.strip())

    @property
    def trains(self) -> bool:
        """Whether to train: as ``train`` says, else unless only ``test`` is set."""
        return not self.test if self.train is None else self.train


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise DoRAError(f"{name} must be {', '.join(choices)}; got {value!r}.")
