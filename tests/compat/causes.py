"""Why some model classes of mlx-lm do not work, or not completely: data for the table.

`test_models` corrects mlx-lm's faults and checks that these classes then work.
"""

# Class: whose fault it is, and the cause.
CAUSES = {
    "afm7": (
        "mlx_dora",
        "A `FusedLinear` returns three projections at once; no DoRA layer does that.",
    ),
    "bitnet": (
        "mlx-lm",
        "The weights are packed ternary numbers. Only a Metal kernel without a "
        "gradient can read them.",
    ),
    "deepseek_v41": (
        "mlx-lm",
        "A gradient reaches the indices of the top experts, and keys and values "
        "rounded to fp8 and fp4; neither operation has a gradient. With "
        "`mx.stop_gradient` on both, all steps work.",
    ),
    "gemma3n": (
        "mlx-lm",
        "AltUp clips the weights of its two small layers in each forward pass. No "
        "adapter can wrap them, neither LoRA nor DoRA.",
    ),
    "kimi_k3": (
        "mlx-lm",
        "The layers that mix the residual streams are never called; the model only "
        "reads their weights. No adapter can wrap them, neither LoRA nor DoRA.",
    ),
    "muse_spark": (
        "mlx-lm",
        "Every block runs on Metal kernels. Linux does not have them, and MLX cannot "
        "differentiate them.",
    ),
    "olmo": (
        "mlx-lm",
        "The model adds the mask to the scores, but the mask that mlx-lm makes is the "
        'word "causal". With numbers instead, all steps work.',
    ),
    "prism_hadamard_qwen35": (
        "mlx_dora",
        "Layers packed in 2 bits rotate their input; no DoRA layer does that.",
    ),
    "recurrent_gemma": (
        "mlx-lm",
        "`Model.__init__` forgets `super().__init__()`. With it, all steps work.",
    ),
}
# The same for classes with a different cause in 4 bits.
CAUSES_PACKED = {
    "afm7": (
        "mlx-lm",
        "`FusedLinear.to_quantized` lacks the argument `mode`, so mlx-lm cannot pack "
        "it.",
    ),
}
# Gated delta nets, by what their state decays with; `gpu_branches` finds them.
GATED_DELTA = {
    "head": (
        "olmo_hybrid",
        "prism_hadamard_qwen35",
        "qwen3_5",
        "qwen3_5_moe",
        "qwen3_next",
    ),
    "key": ("bailing_moe_v3", "kimi_k3", "kimi_linear"),
}
