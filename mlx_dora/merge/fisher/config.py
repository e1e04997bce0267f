"""How Fisher information is estimated. Imports no MLX: options are made from it."""

from dataclasses import dataclass
from typing import Literal

from mlx_dora.data.config import DataConfig
from mlx_dora.options import option


@dataclass(frozen=True, kw_only=True)
class FisherConfig(DataConfig):
    """The data, how much of it, and what to keep of the information.

    Attributes:
        whole: The prompts of completions and chats count too, as plain text does;
            `mask_prompt` is not looked at.
    """

    split: Literal["train", "valid", "test"] = option("train", help="Part of the data.")
    whole: bool = option(False, help="Count every token, not the answers' alone.")
    batch_size: int = option(4, help="Rows in a batch.", least=1)
    num_batches: int = option(
        16,
        help="Batches to look at, spread over the data; -1 for all.",
        least=1,
        special=(-1,),
    )
    max_seq_length: int = option(
        512, help="Longer rows are cut to this many tokens.", least=2
    )
    labels: Literal["sampled", "data"] = option(
        "sampled",
        help="What the squared gradients are of: tokens drawn from the model "
        "(the Fisher information) or the data's (the empirical one).",
    )
    granularity: Literal["row", "element"] = option(
        "row",
        help="One number an output row, which merges exactly; or one an "
        "element, as many as the weights.",
    )
    seed: int = option(0, help="Of the drawn tokens.", least=0)
    memory_limit: int = option(
        2 * 10**9,
        help="Most bytes that activations and sums of the looked-at modules "
        "take at once; what is over it waits for another pass over the data.",
        unit="bytes",
        least=1,
    )
