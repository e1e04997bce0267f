"""Why a model class of mlx-lm does not come through whole: data for the table.

`test_models` puts mlx-lm's faults right and sees those classes come through.
"""

# Whose it is, and what it is.
CAUSES = {
    "afm7": (
        "mlx_dora",
        "A `FusedLinear` returns three projections at once; no DoRA layer does.",
    ),
    "bitnet": (
        "mlx-lm",
        "The weights are packed ternary numbers, which only a Metal kernel without a "
        "gradient reads.",
    ),
    "deepseek_v41": (
        "mlx-lm",
        "A gradient runs into the indices of the top experts, and into keys and values "
        "rounded to fp8 and fp4, which has none. With `mx.stop_gradient` on both, all "
        "steps work.",
    ),
    "gemma3n": (
        "mlx-lm",
        "AltUp clips the weights of its two small layers in each forward pass. No "
        "adapter can go over them, LoRA no more than DoRA.",
    ),
    "kimi_k3": (
        "mlx-lm",
        "The layers that mix the residual streams are never called, only their weights "
        "read. No adapter can go over them, LoRA no more than DoRA.",
    ),
    "muse_spark": (
        "mlx-lm",
        "Every block runs on Metal kernels, which Linux lacks and MLX cannot "
        "differentiate.",
    ),
    "olmo": (
        "mlx-lm",
        "The mask is added to the scores, but the mask that mlx-lm makes is the word "
        '"causal". With numbers instead, all steps work.',
    ),
    "prism_hadamard_qwen35": (
        "mlx_dora",
        "Layers packed in 2 bits that rotate their input; no DoRA layer does.",
    ),
    "recurrent_gemma": (
        "mlx-lm",
        "`Model.__init__` forgets `super().__init__()`. With it, all steps work.",
    ),
}
# The same where it is another in 4 bits.
CAUSES_PACKED = {
    "afm7": (
        "mlx-lm",
        "`FusedLinear.to_quantized` lacks the argument `mode`, so mlx-lm cannot pack "
        "it.",
    ),
}
