"""Documents packed into a row give the same results as documents in separate rows."""

import importlib
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_dora.data.batches import pack_batch, pad_batch
from mlx_dora.data.documents import (
    MASKED,
    PACKABLE,
    DocumentCache,
    check_packable,
    document_caches,
    mask_bytes,
)
from mlx_dora.data.targets import Example
from mlx_dora.errors import DoRAError
from mlx_dora.evaluate.loss import loss_fn
from tests.checks import assert_close, to_numpy

ARGUMENTS: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "layer_norm_eps": 1e-5,
    "layer_norm_epsilon": 1e-5,
    "norm_epsilon": 1e-5,
    "norm_eps": 1e-5,
    "vocab_size": 64,
    "rope_theta": 10000.0,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}
OWN: dict[str, dict[str, Any]] = {
    "cohere": {
        "logit_scale": 0.1,
        "attention_bias": False,
        "layer_norm_bias": False,
        "use_qk_norm": False,
    },
    "cohere2": {
        "sliding_window": 4,
        "sliding_window_pattern": 2,
    },
    "exaone": {
        "num_layers": 2,
        "layer_norm_epsilon": 1e-05,
    },
    "gemma2": {
        "query_pre_attn_scalar": 8,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "gemma3_text": {
        "sliding_window": 4,
        "sliding_window_pattern": 2,
        "query_pre_attn_scalar": 8,
        "rope_local_base_freq": 10000.0,
    },
    "glm4": {
        "attention_bias": True,
        "partial_rotary_factor": 0.5,
    },
    "granite": {
        "logits_scaling": 2.0,
        "attention_multiplier": 0.3,
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.5,
        "attention_bias": False,
        "mlp_bias": False,
    },
    "helium": {"attention_bias": False, "mlp_bias": False},
    "internlm2": {"bias": False},
    "llama": {
        "sliding_window": 4,
        "layer_types": [
            "sliding_attention",
            "full_attention",
        ],
    },
    "minicpm": {
        "dim_model_base": 16,
        "scale_depth": 1.4,
        "scale_emb": 2.0,
    },
    "mixtral": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "nemotron": {
        "partial_rotary_factor": 0.5,
        "hidden_act": "relu2",
    },
    "qwen2_moe": {
        "num_experts_per_tok": 2,
        "num_experts": 4,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 24,
    },
    "qwen3_moe": {
        "num_experts_per_tok": 2,
        "num_experts": 4,
        "moe_intermediate_size": 24,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
    },
    "seed_oss": {
        "attention_bias": False,
        "attention_out_bias": False,
        "mlp_bias": False,
    },
    "stablelm": {
        "partial_rotary_factor": 0.5,
        "use_qkv_bias": False,
        "qk_layernorm": False,
    },
}
LENGTHS = (7, 11, 5)
DOCUMENTS = [
    np.random.default_rng(i).integers(1, 60, size=length).tolist()
    for i, length in enumerate(LENGTHS)
]
ROW = [token for document in DOCUMENTS for token in document]


def make(name: str) -> Any:
    home = importlib.import_module(f"mlx_lm.models.{name}")
    mx.random.seed(1)
    settings = {
        **ARGUMENTS,
        "model_type": name,
        **OWN.get(name, {}),
    }
    return home.Model(home.ModelArgs.from_dict(settings))


@pytest.mark.parametrize("has_mask", [False, True])
@pytest.mark.parametrize("name", PACKABLE)
def test_a_document_sees_only_itself(
    name: str, has_mask: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make(name)
    check_packable(model)
    numbers = mx.array(np.repeat([1, 2, 3], LENGTHS))[None]
    calls = count_calls(monkeypatch)
    caches = document_caches(model, numbers)
    if has_mask:
        caches = [DocumentCache(numbers)] * len(caches)
    packed = model(mx.array([ROW]), cache=caches)[0]
    is_reached = not has_mask and name not in MASKED
    assert calls == [(*LENGTHS,)] * len(caches) * is_reached
    assert mask_bytes(model, 2, 100) == (20_000 if name in MASKED else 0)
    alone = mx.concatenate([model(mx.array([document]))[0] for document in DOCUMENTS])
    assert_close(packed, to_numpy(alone), bound=1e-5)
    together = model(mx.array([ROW]))[0]  # without the caches documents mix
    first = LENGTHS[0]
    assert_close(
        together[:first],
        to_numpy(alone[:first]),
        bound=1e-5,
    )
    with pytest.raises(AssertionError):
        assert_close(
            together[first:],
            to_numpy(alone[first:]),
            bound=1e-2,
        )


def count_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The lengths of the documents in each call of a block's attention."""
    calls: list[tuple[int, ...]] = []
    plain = DocumentCache.attend

    def attend(self: DocumentCache, queries: Any, *args: Any, **kwargs: Any) -> Any:
        assert self._starts is not None
        (starts,) = self._starts
        calls.append(tuple(np.diff([0, *starts, queries.shape[2]]).tolist()))
        return plain(self, queries, *args, **kwargs)

    monkeypatch.setattr(DocumentCache, "attend", attend)
    return calls


@pytest.mark.compiled
def test_traced_rows_get_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("llama")
    numbers = mx.array(np.repeat([1, 2, 3], LENGTHS))[None]
    eager = model(mx.array([ROW]), cache=document_caches(model, numbers))
    calls = count_calls(monkeypatch)
    traced = mx.compile(
        lambda n: model(mx.array([ROW]), cache=document_caches(model, n))
    )
    assert_close(traced(numbers), to_numpy(eager), bound=1e-5)
    assert not calls


def test_other_calls_of_a_redirected_model_are_unchanged() -> None:
    before = make("qwen3")(mx.array([ROW]))
    document_caches(make("qwen3"), mx.zeros((1, 4)))
    assert (make("qwen3")(mx.array([ROW])) == before).all()


EXAMPLES: list[Example] = [
    ([5, 9, 7, 11, 30, 31], 2),
    (list(range(60, 90)), 0),
    ([8, 1, 4], ((2, 3),)),
    (list(range(100, 120)), ((2, 5), (9, 20))),
]


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_the_loss_of_a_packed_document_equals_its_loss_alone(
    tiny_model: nn.Module, number: int
) -> None:
    rows = [EXAMPLES[:3], EXAMPLES[3:]]
    tokens, marks = pack_batch(rows, 64)
    row, place = divmod(number, 3)
    here = (marks[:, :, 1] == place + 1) & (mx.arange(2)[:, None] == row)
    only = mx.stack([marks[:, :, 0] * here, marks[:, :, 1]], axis=-1)
    value, count = loss_fn(tiny_model, tokens, only)
    expected, alone = loss_fn(tiny_model, *pad_batch([EXAMPLES[number]], 64))
    assert int(count) == int(alone) > 0
    assert_close(value, to_numpy(expected), bound=1e-6)


def test_the_gradient_of_a_packed_batch_is_that_of_its_documents(
    make_tiny_model: Callable[..., nn.Module],
) -> None:
    model = make_tiny_model()
    whole = nn.value_and_grad(model, loss_fn)
    (value, count), gradients = whole(
        model, *pack_batch([EXAMPLES[:3], EXAMPLES[3:]], 64)
    )
    (loss, alone), expected = whole(model, *pad_batch(EXAMPLES, 64))
    assert int(count) == int(alone) == 4 + 29 + 1 + 14
    assert_close(value, to_numpy(loss), bound=1e-6)
    weight = gradients["model"]["layers"][0]["self_attn"]["k_proj"]["weight"]
    other = expected["model"]["layers"][0]["self_attn"]["k_proj"]["weight"]
    assert_close(weight, to_numpy(other), bound=1e-5)


@pytest.mark.parametrize("name", ["mamba", "gpt2"])
def test_models_that_mix_documents_are_refused_by_name(
    name: str,
) -> None:
    home = importlib.import_module(f"mlx_lm.models.{name}")
    model = home.Model.__new__(home.Model)
    with pytest.raises(DoRAError, match=rf"keep documents apart in {name}"):
        check_packable(model)
