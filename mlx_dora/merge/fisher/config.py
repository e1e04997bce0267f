"""Settings for estimating Fisher information; command-line options come from them."""

from dataclasses import dataclass
from typing import Literal

from mlx_dora.data.config import DataConfig
from mlx_dora.options import option


@dataclass(frozen=True, kw_only=True)
class FisherConfig(DataConfig):
    """The data, how much of it to use, and the form of the information.

    Attributes:
        whole: Count the prompts of completions and chats too, like plain text.
            `mask_prompt` is ignored.
    """

    split: Literal["train", "valid", "test"] = option(
        "train", help="Split of the data."
    )
    whole: bool = option(False, help="Count every token, not only the answers.")
    batch_size: int = option(4, help="Rows in a batch.", least=1)
    num_batches: int = option(
        16,
        help="Number of batches, spread over the data; -1 for all.",
        least=1,
        special=(-1,),
    )
    max_seq_length: int = option(
        512, help="Longer rows are cut to this many tokens.", least=2
    )
    labels: Literal["sampled", "data"] = option(
        "sampled",
        help="Target tokens of the gradients: drawn from the model (Fisher "
        "information) or taken from the data (empirical Fisher information).",
    )
    granularity: Literal["row", "element"] = option(
        "row",
        help="One number per output row, which merges exactly, or one per "
        "element, as many as there are weights.",
    )
    seed: int = option(0, help="Random seed for drawing target tokens.", least=0)
    memory_limit: int = option(
        2 * 10**9,
        help="Maximum bytes for activations and sums of the modules in one pass; "
        "further modules wait for another pass over the data.",
        unit="bytes",
        least=1,
    )
