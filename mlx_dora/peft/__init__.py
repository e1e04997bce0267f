"""Adapters from and to Hugging Face PEFT: DoRA and LoRA on linear layers."""

from mlx_dora.peft.convert import convert_adapter
from mlx_dora.peft.reading import from_peft
from mlx_dora.peft.writing import to_peft

__all__ = ["convert_adapter", "from_peft", "to_peft"]
