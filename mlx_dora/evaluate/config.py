"""Settings of an evaluation."""

from dataclasses import dataclass
from typing import Literal

from mlx_dora.data.config import DataConfig
from mlx_dora.options import option


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(DataConfig):
    """Models to compare, and the data to compare them on."""

    model: str | None = option(
        None,
        help="Folder or Hugging Face id of the base; default: the base that the "
        "adapter records.",
        path="or id",
        group="Common options",
    )
    adapter_path: str | None = option(
        None,
        help="Adapter to compare with the base.",
        path="local",
        group="Common options",
    )
    fused_path: str | None = option(
        None,
        help="Fused model to compare; with an adapter, its logits are compared too.",
        path="local",
        group="Common options",
    )
    split: Literal["train", "valid", "test"] | None = option(
        None,
        help="Split of the data; default: test if it exists, else valid.",
        group="Common options",
    )
    batch_size: int = option(4, help="Rows per batch.", least=1)
    num_batches: int = option(
        -1,
        help="Batches to evaluate, spread over the data; -1 for all.",
        least=1,
        special=(-1,),
    )
    max_seq_length: int = option(
        2048, help="Truncate rows to this many tokens.", least=2
    )
    labels: bool = option(True, help="Measure accuracy if the answers are labels.")
    samples: int = option(3, help="Prompts that each model continues.", least=0)
    max_tokens: int = option(64, help="Length of a continuation, in tokens.", least=1)
    trust_remote_code: bool = option(
        False, help="Allow code from the model's repository to run.", group="Advanced"
    )
