"""The model that ours and PEFT's measurements share; needs neither MLX nor torch."""

SHAPE = {
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
}
"""Llama 3.2 1B's, with a small vocabulary."""
