"""Where the data is and how its rows read; mlx-lm's names and defaults."""

from dataclasses import dataclass
from typing import Any

from mlx_dora.errors import DoRAError
from mlx_dora.options import check_options, option


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """A data set and the names of its features.

    A row is one of: completions (`prompt_feature` and `completion_feature`), a chat
    (`chat_feature`, a list of messages; ``tools`` beside it is used), or plain text
    (`text_feature`). The first row of a file decides for the whole file.
    """

    data: str = option(
        "mlx-community/WikiSQL",
        help="Folder with {train,valid,test}.jsonl, or the name of a data set "
        "on the Hugging Face Hub.",
        path="or id",
        may_change=True,
    )
    hf_dataset: dict[str, Any] | list[Any] | None = option(
        None,
        help="Hub data set(s) with splits and features, as in mlx-lm's YAML; "
        "takes the place of data.",
        may_change=True,
    )
    mask_prompt: bool = option(
        False,
        help="Count only the completion's tokens in the loss; in a chat, the "
        "assistant's turn that ends the row.",
        recorded=True,
    )
    all_turns: bool = option(
        False,
        help="In chats, count every turn of the assistant's in the loss and "
        "nothing else.",
        recorded=True,
    )
    prompt_feature: str = option(
        "prompt", help="Key of the prompt in completions data."
    )
    completion_feature: str = option(
        "completion", help="Key of the completion in completions data."
    )
    chat_feature: str = option("messages", help="Key of the messages in chat data.")
    text_feature: str = option("text", help="Key of the text in plain text data.")

    def __post_init__(self) -> None:
        """Refuse names that cannot be keys.

        Raises:
            DoRAError: If a value is not allowed, a feature's name is empty, or
                ``hf_dataset`` lacks its path.
        """
        check_options(self)
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
