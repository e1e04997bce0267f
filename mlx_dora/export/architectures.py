"""llama.cpp's architectures for mlx-lm's classes, and the names of their tensors."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mlx_dora.errors import DoRAError
from mlx_dora.peft.names import names_of


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """How llama.cpp stores a class of models.

    Attributes:
        name: Its name in GGUF (``general.architecture``).
        pairs: Whether rows of q and k stand in the order of `pairs_order`.
    """

    name: str
    pairs: bool = False


# The classes of llama.cpp's converter that only rename a linear layer or, in the llama
# family, also reorder q and k (``LlamaModel.undo_permute``). Others split, combine or
# transpose weights, which a LoRA would have to follow.
ARCHITECTURES = {
    "cohere2": Architecture(name="cohere2"),
    "gemma": Architecture(name="gemma"),
    "gemma2": Architecture(name="gemma2"),
    "gemma3_text": Architecture(name="gemma3"),
    "granite": Architecture(name="granite", pairs=True),
    "llama": Architecture(name="llama", pairs=True),
    "olmo2": Architecture(name="olmo2"),
    "phi3": Architecture(name="phi3"),
    "qwen2": Architecture(name="qwen2"),
    "qwen3": Architecture(name="qwen3"),
    "smollm3": Architecture(name="smollm3", pairs=True),
    "starcoder2": Architecture(name="starcoder2"),
}


def architecture_of(kind: str | None) -> Architecture:
    """Return the architecture of a class of mlx-lm.

    Raises:
        DoRAError: If the class is not in the table.
    """
    if kind not in ARCHITECTURES:
        raise DoRAError(
            f"adapters of {kind or 'this class'} do not convert to GGUF; the classes "
            f"that do are {', '.join(ARCHITECTURES)}. Fuse the adapter instead "
            "(mlx_dora.fuse --export gguf)."
        )
    return ARCHITECTURES[kind]


def gguf_package() -> Any:
    """Import the package ``gguf``.

    Raises:
        DoRAError: If it is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise DoRAError(
            "writing GGUF needs the package gguf: pip install 'mlx_dora[gguf]'."
        ) from error
    return gguf


def tensor_names(kind: str, blocks: int) -> Callable[[str], str | None]:
    """Return a function from MLX's path of a module to llama.cpp's name of its weight.

    It returns None for a module that the architecture does not have. The names are
    those of the package ``gguf``, which knows transformers' names.
    """
    gguf = gguf_package()
    by_name = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(by_name[architecture_of(kind).name], blocks)
    names = names_of(kind)
    assert names is not None, f"{kind} is not in the table of transformers' names"

    def name(path: str) -> str | None:
        theirs = names.to_transformers(path)
        return table.get_name(f"{theirs}.weight", try_suffixes=(".weight",))

    return name


def head_counts(config: Mapping[str, Any]) -> dict[str, int]:
    """Return the number of heads of the projections whose rows are reordered."""
    heads = int(config["num_attention_heads"])
    kv = config.get("num_key_value_heads")
    return {"q_proj": heads, "k_proj": heads if kv is None else int(kv)}
