"""Where the data is and how its rows read; mlx-lm's names and defaults."""

from dataclasses import dataclass, field
from typing import Any, Literal

from mlx_dora.errors import DoRAError


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """A data set and the names of its features.

    A row is one of: completions (`prompt_feature` and `completion_feature`), a chat
    (`chat_feature`, a list of messages; ``tools`` beside it is used), or plain text
    (`text_feature`). The first row of a file decides for the whole file.
    """

    data: str = field(
        default="mlx-community/WikiSQL",
        metadata={
            "help": "Folder with {train,valid,test}.jsonl, or the name of a data set "
            "on the Hugging Face Hub."
        },
    )
    hf_dataset: dict[str, Any] | list[Any] | None = field(
        default=None,
        metadata={
            "help": "Hub data set(s) with splits and features, as in mlx-lm's YAML; "
            "takes the place of data."
        },
    )
    mask_prompt: bool = field(
        default=False,
        metadata={
            "help": "Count only the completion's tokens in the loss; in a chat, the "
            "assistant's turn that ends the row."
        },
    )
    all_turns: bool = field(
        default=False,
        metadata={
            "help": "In chats, count every turn of the assistant's in the loss and "
            "nothing else."
        },
    )
    prompt_feature: str = field(
        default="prompt", metadata={"help": "Key of the prompt in completions data."}
    )
    completion_feature: str = field(
        default="completion",
        metadata={"help": "Key of the completion in completions data."},
    )
    chat_feature: str = field(
        default="messages", metadata={"help": "Key of the messages in chat data."}
    )
    text_feature: str = field(
        default="text", metadata={"help": "Key of the text in plain text data."}
    )

    def __post_init__(self) -> None:
        """Refuse names that cannot be keys.

        Raises:
            DoRAError: If a feature's name is empty or ``hf_dataset`` lacks its path.
        """
        for name in ("prompt", "completion", "chat", "text"):
            if not getattr(self, f"{name}_feature"):
                raise DoRAError(f"{name}_feature must be the name of a key, got ''.")
        for one in hub_entries(self.hf_dataset):
            if not isinstance(one, dict) or not isinstance(one.get("path"), str):
                raise DoRAError(
                    f"hf_dataset needs a mapping with the key 'path', got {one!r}."
                )


def hub_entries(hf_dataset: dict[str, Any] | list[Any] | None) -> list[Any]:
    """The entries of an ``hf_dataset`` setting, which may be one mapping or several."""
    if hf_dataset is None:
        return []
    return hf_dataset if isinstance(hf_dataset, list) else [hf_dataset]


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
