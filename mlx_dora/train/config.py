"""How a model is trained; mlx-lm's names and defaults.

Imports no MLX, so that the command line can make its options from the fields.
"""

from dataclasses import dataclass
from typing import Any, Literal

from mlx_dora.data.config import DataConfig
from mlx_dora.errors import DoRAError
from mlx_dora.options import option

Optimizer = Literal["adam", "adamw", "muon", "sgd", "adafactor"]
FineTuneType = Literal["dora", "lora", "full"]
SERVICES = ("wandb", "swanlab")


# Inherits so that each option of the data exists once, here and for evaluation.
@dataclass(frozen=True, kw_only=True)
class TrainConfig(DataConfig):
    """Settings of one training, the adapter's own (`DoRAConfig`) apart.

    Field for field what ``mlx_lm.lora`` calls them, with the same defaults, but for
    ``fine_tune_type``, which is ``"dora"`` here. ``iters`` counts batches: with
    ``grad_accumulation_steps`` k the weights change at every k-th (and at the last).
    ``lora_plus_ratio`` is LoRA+ (arXiv:2402.12354); the magnitude keeps the plain rate.
    """

    model: str | None = option(
        None,
        help="Folder or Hugging Face id of the model.",
        path="or id",
        may_change=True,
    )
    train: bool | None = option(
        None,
        help="Train; the default, unless only --test is asked for.",
        may_change=True,
    )
    fine_tune_type: FineTuneType = option(
        "dora",
        help="What to train: a DoRA or LoRA adapter, or the blocks' own weights.",
        recorded=True,
    )
    optimizer: Optimizer = option("adam", help="Optimizer.", recorded=True)
    optimizer_config: dict[str, Any] | None = option(
        None, help="Settings by optimizer, as {adamw: {weight_decay: 0.1}}."
    )
    seed: int = option(
        0,
        help="Seed of the adapter's start, the data order and dropout.",
        least=0,
        below=2**64,
        recorded=True,
    )
    batch_size: int = option(4, help="Rows in a batch.", least=1, recorded=True)
    iters: int = option(
        1000, help="Batches to train for.", least=1, may_change=True, recorded=True
    )
    epochs: int | None = option(
        None,
        help="Train for so many passes over the data, whatever iters is.",
        least=1,
        may_change=True,
    )
    packing: bool = option(
        False,
        help="Lay short examples end to end in rows of up to max_seq_length "
        "tokens, each seeing itself alone.",
        recorded=True,
    )
    val_batches: int = option(
        25,
        help="Batches of a validation; -1 for the whole set, 0 for none.",
        least=0,
        special=(-1,),
    )
    learning_rate: float = option(
        1e-05, help="Learning rate, if there is no schedule.", above=0, recorded=True
    )
    steps_per_report: int = option(
        10, help="Steps between reports of the loss.", least=1
    )
    steps_per_eval: int = option(200, help="Steps between validations.", least=1)
    epochs_per_eval: int | None = option(
        None,
        help="Validate after so many passes over the data, not steps_per_eval.",
        least=1,
    )
    resume_adapter_file: str | None = option(
        None,
        help="Start from these weights (adapters.safetensors, or its folder).",
        path="local",
        may_change=True,
    )
    adapter_path: str = option(
        "adapters", help="Folder of the adapter.", path="local", may_change=True
    )
    save_every: int = option(
        100, help="Steps between writes of the adapter and a checkpoint.", least=1
    )
    resume: bool = option(
        False,
        help="Go on from the newest checkpoint in the adapter's folder, exactly.",
        may_change=True,
    )
    force: bool = option(
        False, help="Resume even with settings that differ from then.", may_change=True
    )
    keep_last: int = option(
        2, help="Checkpoints to keep, the newest ones.", least=1, may_change=True
    )
    early_stop: int = option(
        0,
        help="Stop after so many validations without a better loss; 0 for never.",
        least=0,
    )
    max_grad_norm: float | None = option(
        None,
        help="Shorten the gradient of all parameters to this norm.",
        above=0,
        recorded=True,
    )
    max_bad_steps: int = option(
        10,
        help="Steps in a row that may be passed over, their loss or gradient "
        "not being finite, before the training stops.",
        least=1,
    )
    lora_plus_ratio: float = option(
        1.0,
        help="LoRA+: how many times the learning rate lora_b takes.",
        above=0,
        recorded=True,
    )
    rank_every: int = option(
        50,
        help="Variant adaptive: steps between re-allocations of ranks.",
        least=1,
        variant="adaptive",
    )
    rank_rounds: int = option(
        8,
        help="Variant adaptive: how many re-allocations.",
        least=0,
        variant="adaptive",
    )
    magnitude_share: float = option(
        0.2,
        help="Variant bidora: share of the training rows that train the "
        "magnitudes, and nothing else.",
        above=0,
        below=1,
        variant="bidora",
    )
    test: bool = option(
        False, help="Measure the loss on the test set, after training.", may_change=True
    )
    test_batches: int = option(
        500,
        help="Batches of the test; -1 for the whole set.",
        least=1,
        special=(-1,),
        may_change=True,
    )
    max_seq_length: int = option(
        2048, help="Longer rows are cut to this many tokens.", least=2, recorded=True
    )
    grad_checkpoint: bool = option(
        False, help="Recompute each block in the backward pass: less memory, more time."
    )
    grad_accumulation_steps: int = option(
        1,
        help="Batches that make one update, averaged over their tokens.",
        least=1,
        recorded=True,
    )
    clear_cache_threshold: int = option(
        0,
        help="Free MLX's buffer cache after a step that leaves more bytes in it "
        "(2GB, 500MB).",
        unit="bytes",
        least=0,
        may_change=True,
    )
    lr_schedule: dict[str, Any] | None = option(
        None,
        help="Schedule: name, arguments, warmup, warmup_init, as in mlx-lm.",
        recorded=True,
    )
    report_to: str | None = option(
        None, help="Report to wandb, swanlab or wandb,swanlab.", may_change=True
    )
    project_name: str | None = option(
        None, help="Project for those services.", may_change=True
    )
    trust_remote_code: bool = option(
        False,
        help="Let the model's and tokenizer's repository run its own code.",
        may_change=True,
    )
    overwrite: bool = option(
        False, help="Replace the adapter that is in the folder.", may_change=True
    )

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            DoRAError: Naming the field, what is allowed and what came.
        """
        super().__post_init__()
        unknown = [name for name in self.services if name not in SERVICES]
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
