"""Converts adapters from and to Hugging Face PEFT: DoRA and LoRA on linear layers."""

from typing import TYPE_CHECKING

from mlx_dora.lazy import public_names

if TYPE_CHECKING:
    from mlx_dora.peft.convert import convert_adapter
    from mlx_dora.peft.reading import from_peft
    from mlx_dora.peft.writing import to_peft

_HOME = {
    "convert_adapter": "mlx_dora.peft.convert",
    "from_peft": "mlx_dora.peft.reading",
    "to_peft": "mlx_dora.peft.writing",
}

__all__ = ["convert_adapter", "from_peft", "to_peft"]

__getattr__, __dir__ = public_names(__name__, _HOME)
