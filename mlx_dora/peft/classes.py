"""Table that maps module names of mlx-lm's classes to those of transformers.

The names are those of models that `AutoModelForCausalLM` of transformers 5 builds, or
`AutoModelForImageTextToText` where it builds none. The table was made by building every
class in both libraries and comparing the paths of their linear layers;
`tests/compat/test_peft_names.py` repeats this comparison.
"""

from dataclasses import dataclass

# Transformers 5 stores a router's matrix as a bare parameter, which PEFT's LoRA for
# linear layers cannot adapt.
ROUTERS = (
    "mlp.gate",
    "mlp.gate.proj",
    "mlp.router",
    "block_sparse_moe.gate",
    "block_sparse_moe.router.layer",
    "feed_forward.gate",
    "feed_forward.router",
)
Pairs = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class ClassNames:
    """How module paths of an mlx-lm model class map to those of transformers.

    Attributes:
        starts: Pairs of first parts, in MLX and in transformers; the first match wins.
        ends: Pairs of last parts, in MLX and in transformers; the first match wins.
        missing: Last parts of modules that are not linear layers in transformers, for
            example two projections combined in one.
        has_conv1d: Whether transformers stores weights with shape (in, out).
        refusal: Why adapters of the class cannot be converted.
    """

    starts: Pairs = ()
    ends: Pairs = ()
    missing: tuple[str, ...] = ()
    has_conv1d: bool = False
    refusal: str | None = None

    def to_transformers(self, path: str) -> str:
        """Return the path in transformers of the module at `path` in MLX."""
        return _swapped(path, self.starts, self.ends)

    def to_mlx(self, path: str) -> str:
        """Return the path in MLX of the module at `path` in transformers."""
        back = tuple((theirs, ours) for ours, theirs in self.starts)
        ends = tuple((theirs, ours) for ours, theirs in self.ends)
        return _swapped(path, back, ends)

    def is_missing(self, path: str) -> bool:
        """Whether transformers has no linear layer for the module at `path` in MLX."""
        return any(path.endswith(f".{end}") for end in (*ROUTERS, *self.missing))


def _swapped(path: str, starts: Pairs, ends: Pairs) -> str:
    for old, new in starts:
        if path == old or path.startswith(f"{old}."):
            path = new + path[len(old) :]
            break
    for old, new in ends:
        if path.endswith(f".{old}"):
            return path[: -len(old)] + new
    return path


# fmt: off
SAME = frozenset({
    "afmoe", "apertus", "cohere", "cohere2", "dbrx", "deepseek_v2", "deepseek_v3",
    "deepseek_v32", "dots1", "ernie4_5", "ernie4_5_moe", "exaone4", "exaone_moe",
    "gemma", "gemma2", "gemma3_text", "gemma3n", "gemma4_text", "glm", "glm4",
    "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "gpt_bigcode", "gpt_oss", "granite",
    "granitemoe", "helium", "hunyuan", "hunyuan_v1_dense", "internlm3", "jamba",
    "lfm2", "llama", "longcat_flash", "mamba", "mamba2", "mellum", "mimo_v2_flash",
    "minicpm3", "minimax", "ministral3", "mistral4", "mixtral", "nemotron", "olmo2",
    "olmo3", "olmo_hybrid", "olmoe", "phi", "phi3", "phimoe", "qwen2", "qwen2_moe",
    "qwen3", "qwen3_moe", "qwen3_next", "seed_oss", "smollm3", "solar_open",
    "stablelm", "starcoder2",
})
_WRAPPED = (
    "gemma3", "gemma4", "kimi_k25", "lfm2-vl", "mistral3", "pixtral", "qwen2_vl",
    "qwen3_vl", "qwen3_vl_moe",
)
# fmt: on
_MULTIMODAL = ClassNames(
    starts=(
        ("language_model.model", "model.language_model"),
        ("language_model.lm_head", "lm_head"),
    )
)
_TEXT_PART = ClassNames(
    starts=(("language_model.model", "model"), ("language_model.lm_head", "lm_head"))
)
DIFFERENT: dict[str, ClassNames] = {
    **dict.fromkeys(_WRAPPED, _MULTIMODAL),
    **dict.fromkeys(("llama4", "qwen3_5", "qwen3_5_moe"), _TEXT_PART),
    "exaone": ClassNames(
        starts=(("transformer.h", "model.layers"),),
        ends=(
            ("attn.attention.q_proj", "self_attn.q_proj"),
            ("attn.attention.k_proj", "self_attn.k_proj"),
            ("attn.attention.v_proj", "self_attn.v_proj"),
            ("attn.attention.out_proj", "self_attn.o_proj"),
            ("mlp.c_fc_0", "mlp.gate_proj"),
            ("mlp.c_fc_1", "mlp.up_proj"),
            ("mlp.c_proj", "mlp.down_proj"),
        ),
    ),
    "falcon_h1": ClassNames(
        refusal="mlx-lm multiplies its weights by the config's multipliers, which "
        "transformers applies to the activations, so the same adapter would compute "
        "something else"
    ),
    "gpt2": ClassNames(starts=(("model.h", "transformer.h"),), has_conv1d=True),
    "gpt_neox": ClassNames(
        starts=(("model.h", "gpt_neox.layers"), ("model.embed_out", "lm_head"))
    ),
    "gptj": ClassNames(starts=(("model.h", "transformer.h"),)),
    # In a model without experts, the shared projections are combined in one module.
    "granitemoehybrid": ClassNames(
        ends=(("mlp.down_proj", "shared_mlp.output_linear"),),
        missing=("mlp.gate_proj", "mlp.up_proj"),
    ),
    "kimi_linear": ClassNames(
        ends=(
            ("self_attn.f_a_proj", "self_attn.forget_gate.f_a_proj"),
            ("self_attn.f_b_proj", "self_attn.forget_gate.f_b_proj"),
        )
    ),
    "laguna": ClassNames(
        ends=tuple(
            (f"mlp.shared_expert.{name}_proj", f"mlp.shared_experts.{name}_proj")
            for name in ("gate", "up", "down")
        )
    ),
    "lfm2_moe": ClassNames(
        ends=(
            ("feed_forward.gate_proj", "feed_forward.w1"),
            ("feed_forward.down_proj", "feed_forward.w2"),
            ("feed_forward.up_proj", "feed_forward.w3"),
        )
    ),
    "llama4_text": ClassNames(starts=(("output", "lm_head"),)),
    "minimax_m3_vl": ClassNames(
        starts=_MULTIMODAL.starts,
        ends=(
            (
                "block_sparse_moe.shared_experts.down_proj",
                "mlp.shared_experts.down_proj",
            ),
        ),
        missing=(
            "block_sparse_moe.shared_experts.gate_proj",
            "block_sparse_moe.shared_experts.up_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
            "self_attn.index_k_proj",
            "self_attn.index_q_proj",
        ),
    ),
    "muse_glimmer": ClassNames(
        starts=(("model.layers", "model.language_model.layers"),)
    ),
    "muse_spark": ClassNames(missing=("self_attn.qkvg_proj", "self_attn.qkv_proj")),
    "nanochat": ClassNames(
        starts=(("transformer.h", "model.layers"),),
        ends=(
            ("attn.c_q", "self_attn.q_proj"),
            ("attn.c_k", "self_attn.k_proj"),
            ("attn.c_v", "self_attn.v_proj"),
            ("attn.c_proj", "self_attn.o_proj"),
            ("mlp.c_fc", "mlp.fc1"),
            ("mlp.c_proj", "mlp.fc2"),
        ),
    ),
    "nemotron_h": ClassNames(starts=(("backbone", "model"),)),
}
# PEFT 0.21 takes these last parts for the experts that transformers 5 fused, also where
# a dense block or a shared expert is meant; and it adapts no out_proj of Mamba.
_EXPERTS = ("gate_proj", "up_proj", "down_proj")
PEFT_REFUSES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        (
            "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1",
            "exaone_moe", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "laguna",
            "longcat_flash", "qwen3_next", "solar_open",
        ),
        _EXPERTS,
    ),
    "afmoe": (*_EXPERTS, "gate"),
    **dict.fromkeys(("mamba", "mamba2", "nemotron_h"), ("out_proj",)),
}  # fmt: skip
