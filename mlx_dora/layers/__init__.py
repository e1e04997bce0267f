"""Drop-in layers for MLX models: a frozen base, a low-rank update and a magnitude."""

from mlx_dora.layers._cache import is_traced
from mlx_dora.layers._fuse import fused_module
from mlx_dora.layers._layer import DoRALayer
from mlx_dora.layers.embedding import DoRAEmbedding
from mlx_dora.layers.linear import DoRALinear
from mlx_dora.layers.multi import DoRAMultiLinear
from mlx_dora.layers.norms import held_norms, shared_pass
from mlx_dora.layers.sharded import has_divided, held_whole, sharded_modules
from mlx_dora.layers.switch import DoRASwitchLinear
from mlx_dora.layers.tensor import TENSOR_TYPES, lora_over
from mlx_dora.layers.wrap import adapt, check_adaptable, dora_class
from mlx_dora.matrix.weight import weight_of

__all__ = [
    "TENSOR_TYPES",
    "DoRAEmbedding",
    "DoRALayer",
    "DoRALinear",
    "DoRAMultiLinear",
    "DoRASwitchLinear",
    "adapt",
    "check_adaptable",
    "dora_class",
    "fused_module",
    "has_divided",
    "held_norms",
    "held_whole",
    "is_traced",
    "lora_over",
    "sharded_modules",
    "shared_pass",
    "weight_of",
]
