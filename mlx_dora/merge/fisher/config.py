"""How Fisher information is estimated. Imports no MLX: options are made from it."""

from dataclasses import dataclass, field
from typing import Literal

from mlx_dora.errors import DoRAError
from mlx_dora.evaluate.config import DataConfig


@dataclass(frozen=True, kw_only=True)
class FisherConfig(DataConfig):
    """The data, how much of it, and what to keep of the information.

    Attributes:
        whole: The prompts of completions and chats count too, as plain text does;
            `mask_prompt` is not looked at.
    """

    split: Literal["train", "valid", "test"] = field(
        default="train", metadata={"help": "Part of the data."}
    )
    whole: bool = field(
        default=False,
        metadata={"help": "Count every token, not the answers' alone."},
    )
    batch_size: int = field(default=4, metadata={"help": "Rows in a batch."})
    num_batches: int = field(
        default=16,
        metadata={"help": "Batches to look at, spread over the data; -1 for all."},
    )
    max_seq_length: int = field(
        default=512, metadata={"help": "Longer rows are cut to this many tokens."}
    )
    labels: Literal["sampled", "data"] = field(
        default="sampled",
        metadata={
            "help": "What the squared gradients are of: tokens drawn from the model "
            "(the Fisher information) or the data's (the empirical one)."
        },
    )
    granularity: Literal["row", "element"] = field(
        default="row",
        metadata={
            "help": "One number an output row, which merges exactly; or one an "
            "element, as many as the weights."
        },
    )
    seed: int = field(default=0, metadata={"help": "Of the drawn tokens."})
    memory_limit: int = field(
        default=2 * 10**9,
        metadata={
            "help": "Most bytes that activations and sums of the looked-at modules "
            "take at once; what is over it waits for another pass over the data.",
            "unit": "bytes",
        },
    )

    def __post_init__(self) -> None:
        """Check every number and choice.

        Raises:
            DoRAError: Naming the field, what is allowed and what came.
        """
        super().__post_init__()
        least = {"batch_size": 1, "num_batches": -1, "max_seq_length": 2, "seed": 0}
        for name, minimum in {**least, "memory_limit": 1}.items():
            value = getattr(self, name)
            if type(value) is not int or value < minimum:
                raise DoRAError(
                    f"{name} must be a whole number of at least {minimum}, got "
                    f"{value!r}."
                )
        if self.num_batches == 0:
            raise DoRAError("num_batches must be -1 or at least 1, got 0.")
        choices = {
            "split": ("train", "valid", "test"),
            "labels": ("sampled", "data"),
            "granularity": ("row", "element"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise DoRAError(
                    f"{name} must be {' or '.join(allowed)}, got "
                    f"{getattr(self, name)!r}."
                )
