"""The settings of an evaluation."""

from dataclasses import dataclass, field
from typing import Literal

from mlx_dora.data.config import DataConfig
from mlx_dora.errors import DoRAError


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(DataConfig):
    """Which models are compared on which data."""

    model: str = field(metadata={"help": "Folder or Hugging Face id of the base."})
    adapter_path: str | None = field(
        default=None, metadata={"help": "Adapter to compare with the base."}
    )
    fused_path: str | None = field(
        default=None,
        metadata={"help": "Fused model to compare; with the adapter's logits too."},
    )
    split: Literal["train", "valid", "test"] | None = field(
        default=None,
        metadata={"help": "Part of the data; test if there is one, else valid."},
    )
    batch_size: int = field(default=4, metadata={"help": "Rows in a batch."})
    num_batches: int = field(
        default=-1,
        metadata={"help": "Batches to look at, spread over the data; -1 for all."},
    )
    max_seq_length: int = field(
        default=2048, metadata={"help": "Longer rows are cut to this many tokens."}
    )
    labels: bool = field(
        default=True,
        metadata={"help": "Measure accuracy where the answers are labels."},
    )
    samples: int = field(
        default=3, metadata={"help": "Prompts to continue side by side."}
    )
    max_tokens: int = field(
        default=64, metadata={"help": "Longest continuation, in tokens."}
    )
    trust_remote_code: bool = field(
        default=False,
        metadata={"help": "Let the model's repository run its own code."},
    )

    def __post_init__(self) -> None:
        """Check every number.

        Raises:
            DoRAError: Naming the field, what is allowed and what came.
        """
        super().__post_init__()
        least = {"batch_size": 1, "max_seq_length": 2, "samples": 0, "max_tokens": 1}
        for name, minimum in {**least, "num_batches": -1}.items():
            value = getattr(self, name)
            if type(value) is not int or value < minimum:
                raise DoRAError(
                    f"{name} must be a whole number of at least {minimum}, got "
                    f"{value!r}."
                )
        if self.num_batches == 0:
            raise DoRAError("num_batches must be -1 or at least 1, got 0.")
        if self.split not in (None, "train", "valid", "test"):
            raise DoRAError(f"split must be train, valid or test, got {self.split!r}.")
