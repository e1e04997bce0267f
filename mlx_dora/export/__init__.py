"""Writes adapters and fused models for other hosts: plain LoRA, llama.cpp, Ollama."""

from typing import TYPE_CHECKING

from mlx_dora.lazy import public_names

if TYPE_CHECKING:
    from mlx_dora.export.convert import convert_to_gguf, convert_to_lora
    from mlx_dora.export.gguf_adapter import GGUFAdapter, to_gguf
    from mlx_dora.export.gguf_model import GGUFModel, fused_to_gguf
    from mlx_dora.export.plain_lora import LoRAConversion, to_lora

_HOME = {
    "GGUFAdapter": "mlx_dora.export.gguf_adapter",
    "GGUFModel": "mlx_dora.export.gguf_model",
    "LoRAConversion": "mlx_dora.export.plain_lora",
    "convert_to_gguf": "mlx_dora.export.convert",
    "convert_to_lora": "mlx_dora.export.convert",
    "fused_to_gguf": "mlx_dora.export.gguf_model",
    "to_gguf": "mlx_dora.export.gguf_adapter",
    "to_lora": "mlx_dora.export.plain_lora",
}

__all__ = [
    "GGUFAdapter",
    "GGUFModel",
    "LoRAConversion",
    "convert_to_gguf",
    "convert_to_lora",
    "fused_to_gguf",
    "to_gguf",
    "to_lora",
]

__getattr__, __dir__ = public_names(__name__, _HOME)
