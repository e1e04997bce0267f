"""Settings of a training, with mlx-lm's names and defaults."""

from dataclasses import dataclass
from typing import Any, Literal

from mlx_dora.data.config import DataConfig
from mlx_dora.errors import DoRAError
from mlx_dora.options import option

Optimizer = Literal["adam", "adamw", "muon", "sgd", "adafactor"]
FineTuneType = Literal["dora", "lora", "full"]
ObjectiveName = Literal["sft", "dpo", "orpo", "kto", "simpo", "grpo"]
Shard = Literal["full", "tensor"]
SERVICES = ("wandb", "swanlab")


# Inherits the data options, which evaluation shares.
@dataclass(frozen=True, kw_only=True)
class TrainConfig(DataConfig):
    """Settings of a training, except those of the adapter (`DoRAConfig`).

    Fields have the names and defaults of ``mlx_lm.lora``, except that
    ``fine_tune_type`` defaults to ``"dora"``. ``iters`` counts batches: with
    ``grad_accumulation_steps`` k, the weights change at every k-th batch and at the
    last. ``lora_plus_ratio`` is LoRA+ (arXiv:2402.12354); it does not affect m.
    """

    model: str | None = option(
        None,
        help="Folder or Hugging Face id of the model.",
        path="or id",
        may_change=True,
        group="Common options",
    )
    train: bool | None = option(
        None,
        help="Train the model; the default unless only --test is given.",
        may_change=True,
        group="Training",
    )
    fine_tune_type: FineTuneType = option(
        "dora",
        help="Kind of training: a DoRA or LoRA adapter, or the full weights of "
        "the blocks.",
        recorded=True,
        group="Common options",
    )
    objective: ObjectiveName = option(
        "sft",
        help="What to minimize: sft, the cross-entropy of examples; dpo, orpo, kto or "
        "simpo, a loss of preferences; grpo, a reward.",
        may_change=True,  # recorded by the objective itself
        group="Common options",
    )
    optimizer: Optimizer = option(
        "adam", help="Name of the optimizer.", recorded=True, group="Training"
    )
    optimizer_config: dict[str, Any] | None = option(
        None,
        help="Settings per optimizer, such as {adamw: {weight_decay: 0.1}}.",
        group="Training",
    )
    seed: int = option(
        0,
        help="Random seed for the adapter's initialization, data order and dropout.",
        least=0,
        below=2**64,
        recorded=True,
        group="Training",
    )
    batch_size: int = option(
        4, help="Rows per batch.", least=1, recorded=True, group="Common options"
    )
    batch_tokens: int | None = option(
        None,
        help="Instead of batch_size: fill each batch with rows of one width, up to "
        "this many tokens with padding.",
        least=2,
        recorded=True,
        group="Common options",
    )
    iters: int = option(
        1000,
        help="Batches to train for.",
        least=1,
        may_change=True,
        recorded=True,
        group="Common options",
    )
    epochs: int | None = option(
        None,
        help="Train for this many passes over the data, instead of iters.",
        least=1,
        may_change=True,
        group="Training",
    )
    packing: bool = option(
        False,
        help="Pack short examples into rows of up to max_seq_length tokens; each "
        "example attends only to itself.",
        recorded=True,
        group="Training",
    )
    val_batches: int = option(
        25,
        help="Batches per validation; -1 for the whole set, 0 for none.",
        least=0,
        special=(-1,),
        group="Validation and test",
    )
    learning_rate: float = option(
        1e-05,
        help="Learning rate, unless lr_schedule is set.",
        above=0,
        recorded=True,
        group="Common options",
    )
    steps_per_report: int = option(
        10, help="Steps between reports of the loss.", least=1, group="Reports"
    )
    steps_per_eval: int = option(
        200, help="Steps between validations.", least=1, group="Validation and test"
    )
    epochs_per_eval: int | None = option(
        None,
        help="Validate after this many passes over the data, instead of every "
        "steps_per_eval steps.",
        least=1,
        group="Validation and test",
    )
    resume_adapter_file: str | None = option(
        None,
        help="Start from these weights (adapters.safetensors or its folder).",
        path="local",
        may_change=True,
        group="Saving and resuming",
    )
    adapter_path: str = option(
        "adapters",
        help="Folder of the adapter.",
        path="local",
        may_change=True,
        group="Common options",
    )
    save_every: int = option(
        100,
        help="Steps between writes of the adapter and a checkpoint.",
        least=1,
        group="Saving and resuming",
    )
    resume: bool = option(
        False,
        help="Resume exactly from the newest checkpoint in the adapter's folder.",
        may_change=True,
        group="Common options",
    )
    force: bool = option(
        False,
        help="Resume even if settings have changed.",
        may_change=True,
        group="Saving and resuming",
    )
    keep_last: int = option(
        2,
        help="Number of newest checkpoints to keep.",
        least=1,
        may_change=True,
        group="Saving and resuming",
    )
    early_stop: int = option(
        0,
        help="Stop after this many validations without a better loss; 0 for never.",
        least=0,
        group="Validation and test",
    )
    max_grad_norm: float | None = option(
        None,
        help="Clip the global gradient norm to this value.",
        above=0,
        recorded=True,
        group="Training",
    )
    max_bad_steps: int = option(
        10,
        help="Stop after this many consecutive steps whose loss or gradient is "
        "not finite; such steps are skipped.",
        least=1,
        group="Training",
    )
    lora_plus_ratio: float = option(
        1.0,
        help="LoRA+: learning rate of lora_b, as a multiple of the learning rate.",
        above=0,
        recorded=True,
        group="Training",
    )
    rank_every: int = option(
        50,
        help="Variant adaptive: steps between reallocations of ranks.",
        least=1,
        variant="adaptive",
        group="Advanced",
    )
    rank_rounds: int = option(
        8,
        help="Variant adaptive: number of reallocations.",
        least=0,
        variant="adaptive",
        group="Advanced",
    )
    magnitude_share: float = option(
        0.2,
        help="Variant bidora: fraction of the training rows that train the "
        "magnitudes only.",
        above=0,
        below=1,
        variant="bidora",
        group="Advanced",
    )
    test: bool = option(
        False,
        help="Evaluate the loss on the test set, after training.",
        may_change=True,
        group="Validation and test",
    )
    test_batches: int = option(
        500,
        help="Batches of the test; -1 for the whole set.",
        least=1,
        special=(-1,),
        may_change=True,
        group="Validation and test",
    )
    max_seq_length: int = option(
        2048,
        help="Truncate rows to this many tokens.",
        least=2,
        recorded=True,
        group="Common options",
    )
    grad_checkpoint: bool = option(
        False,
        help="Recompute each block in the backward pass: less memory, more time.",
        group="Memory",
    )
    grad_accumulation_steps: int = option(
        1,
        help="Batches per update; gradients are averaged over their tokens.",
        least=1,
        recorded=True,
        group="Training",
    )
    shard: Shard | None = option(
        None,
        help="Divide the frozen weights among the processes of mlx.launch, for models "
        "larger than one machine; full: each holds a share of the rows and trains on "
        "rows of its own; tensor: all train on the same rows, and each computes a "
        "share of the heads and of the MLP's width.",
        group="Memory",
    )
    clear_cache_threshold: int = option(
        0,
        help="Free MLX's buffer cache after a step if it holds more bytes than this "
        "(2GB, 500MB).",
        unit="bytes",
        least=0,
        may_change=True,
        group="Memory",
    )
    memory_limit: int | None = option(
        None,
        help="Stop with a checkpoint when MLX's peak memory is above 95 % of this "
        "(16GB); default: the device's limit; 0 to let it run.",
        unit="bytes",
        least=0,
        may_change=True,
        group="Memory",
    )
    lr_schedule: dict[str, Any] | None = option(
        None,
        help="Learning rate schedule: name, arguments, warmup and warmup_init, as in "
        "mlx-lm.",
        recorded=True,
        group="Training",
    )
    report_to: str | None = option(
        None,
        help="Services to report to: wandb, swanlab or wandb,swanlab.",
        may_change=True,
        group="Reports",
    )
    project_name: str | None = option(
        None,
        help="Project name for the services of report_to.",
        may_change=True,
        group="Reports",
    )
    trust_remote_code: bool = option(
        False,
        help="Allow code from the model's and tokenizer's repository to run.",
        may_change=True,
        group="Advanced",
    )
    overwrite: bool = option(
        False,
        help="Replace an existing adapter in the folder.",
        may_change=True,
        group="Saving and resuming",
    )

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            DoRAError: Names the field, the allowed values and the value received.
        """
        super().__post_init__()
        if self.packing and self.batch_tokens is not None:
            raise DoRAError(
                "packing and batch_tokens both fill the batches: set one of them."
            )
        unknown = [name for name in self.services if name not in SERVICES]
        if unknown:
            known = " and ".join(SERVICES)
            raise DoRAError(f"report_to knows {known}, not {', '.join(unknown)}.")

    @property
    def services(self) -> tuple[str, ...]:
        """The services of `report_to`, in lowercase."""
        parts = (self.report_to or "").split(",")
        return tuple(part.strip().lower() for part in parts if part.strip())

    @property
    def trains(self) -> bool:
        """Whether to train: the value of ``train``; if unset, true unless testing."""
        return not self.test if self.train is None else self.train
