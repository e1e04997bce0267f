"""Location and format of the data, with mlx-lm's names and defaults."""

from dataclasses import dataclass
from typing import Any

from mlx_dora.errors import DoRAError
from mlx_dora.options import check_options, option

DEFAULT_DATA = "mlx-community/WikiSQL"  # mlx-lm's


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """A data set and the names of its features.

    The first row of a file sets the format of the whole file; `mlx_dora.data.formats`
    lists the formats.
    """

    OPTION_GROUP = "Data"

    data: str = option(
        DEFAULT_DATA,
        help="Folder with train, valid and test files (.jsonl, .json, .csv, .tsv, "
        ".parquet), a single such file, or a data set on the Hugging Face Hub.",
        path="or id",
        may_change=True,
        group="Common options",
    )
    hf_dataset: dict[str, Any] | list[Any] | None = option(
        None,
        help="Hub data set(s) with splits and features, as in mlx-lm's YAML; "
        "replaces data.",
        may_change=True,
    )
    valid_share: float = option(
        0.1,
        help="Share of the training rows held out for validation if there is no "
        "validation file; 0 for none.",
        least=0,
        below=1,
        may_change=True,
    )
    mask_prompt: bool = option(
        False,
        help="Compute the loss on the completion only; in a chat, on the "
        "assistant's turn that ends the row.",
        recorded=True,
        group="Common options",
    )
    all_turns: bool = option(
        False,
        help="In chats, compute the loss on every assistant turn and nothing else.",
        recorded=True,
    )
    prompt_feature: str = option(
        "prompt", help="Column of the prompt, in rows of prompt and completion."
    )
    completion_feature: str = option("completion", help="Column of the completion.")
    chat_feature: str = option("messages", help="Column of a chat's messages.")
    text_feature: str = option("text", help="Column of plain text.")

    def __post_init__(self) -> None:
        """Refuse names that cannot be keys.

        Raises:
            DoRAError: If a value is not allowed, a feature's name is empty, or an
                entry of ``hf_dataset`` has no path.
        """
        check_options(self)
        for name in ("prompt", "completion", "chat", "text"):
            if not getattr(self, f"{name}_feature"):
                raise DoRAError(f"{name}_feature must be the name of a key, got ''.")
        for entry in hub_entries(self.hf_dataset):
            if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
                raise DoRAError(
                    f"hf_dataset needs a mapping with the key 'path', got {entry!r}."
                )


def hub_entries(hf_dataset: dict[str, Any] | list[Any] | None) -> list[Any]:
    """The ``hf_dataset`` setting as a list; a single mapping is one entry."""
    if hf_dataset is None:
        return []
    return hf_dataset if isinstance(hf_dataset, list) else [hf_dataset]
