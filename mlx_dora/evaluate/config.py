"""The settings of an evaluation."""

from dataclasses import dataclass
from typing import Literal

from mlx_dora.data.config import DataConfig
from mlx_dora.options import option


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(DataConfig):
    """Which models are compared on which data."""

    model: str | None = option(
        None,
        help="Folder or Hugging Face id of the base; what the adapter records if not "
        "given.",
        path="or id",
    )
    adapter_path: str | None = option(
        None, help="Adapter to compare with the base.", path="local"
    )
    fused_path: str | None = option(
        None,
        help="Fused model to compare; with the adapter's logits too.",
        path="local",
    )
    split: Literal["train", "valid", "test"] | None = option(
        None, help="Part of the data; test if there is one, else valid."
    )
    batch_size: int = option(4, help="Rows in a batch.", least=1)
    num_batches: int = option(
        -1,
        help="Batches to look at, spread over the data; -1 for all.",
        least=1,
        special=(-1,),
    )
    max_seq_length: int = option(
        2048, help="Longer rows are cut to this many tokens.", least=2
    )
    labels: bool = option(True, help="Measure accuracy where the answers are labels.")
    samples: int = option(3, help="Prompts to continue side by side.", least=0)
    max_tokens: int = option(64, help="Longest continuation, in tokens.", least=1)
    trust_remote_code: bool = option(
        False, help="Let the model's repository run its own code."
    )
