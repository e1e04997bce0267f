"""Which models cannot be divided for tensor parallelism, and how that is said."""

from collections.abc import Callable
from typing import Any

import mlx.nn as nn
import pytest
from mlx.nn.layers.distributed import shard_linear

from mlx_dora import DoRAConfig, apply_dora
from mlx_dora.adapters.tensor import divide_tensors
from mlx_dora.errors import DoRAError
from tests.adapters.test_sharding import member

Make = Callable[..., nn.Module]


@pytest.mark.parametrize(
    ("changes", "processes", "reason"),
    [
        ({"num_key_value_heads": 1}, 2, "n_kv_heads is 1, which 2 does not divide"),
        ({"intermediate_size": 66}, 4, "Cannot shard the output of size 66 across 4"),
    ],
)
def test_heads_and_widths_that_cannot_be_divided_are_named(
    make_tiny_model: Make, changes: dict[str, Any], processes: int, reason: str
) -> None:
    with pytest.raises(DoRAError, match=rf"this model \(llama\): .*{reason}"):
        divide_tensors(make_tiny_model(**changes), member(0, processes))


def test_packed_columns_that_split_a_group_are_refused(make_tiny_model: Make) -> None:
    model = make_tiny_model(bits=4, intermediate_size=96)  # 3 groups in 2 processes
    with pytest.raises(DoRAError, match="shard tensor cannot divide this model"):
        divide_tensors(model, member(0, 2))


def test_experts_adapters_and_unknown_models_are_refused(make_tiny_model: Make) -> None:
    from mlx_lm.models import mixtral, qwen3_moe

    small: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    unknown = mixtral.Model(
        mixtral.ModelArgs(model_type="mixtral", num_local_experts=2, **small)
    )
    with pytest.raises(DoRAError, match=r"\(mixtral\): mlx-lm has no shard method"):
        divide_tensors(unknown, member(0, 2))
    experts = qwen3_moe.Model(
        qwen3_moe.ModelArgs.from_dict(
            {
                **small,
                "model_type": "qwen3_moe",
                "num_experts": 2,
                "num_experts_per_tok": 1,
                "decoder_sparse_step": 1,
                "mlp_only_layers": [],
                "moe_intermediate_size": 32,
                "rms_norm_eps": 1e-5,
                "head_dim": 8,
                "rope_theta": 1e4,
                "tie_word_embeddings": True,
                "max_position_embeddings": 64,
                "norm_topk_prob": True,
            }
        )
    )
    with pytest.raises(DoRAError, match=r"it has experts: .*switch_mlp\.gate_proj"):
        divide_tensors(experts, member(0, 2))
    model = make_tiny_model()
    apply_dora(model, DoRAConfig(rank=2, num_layers=1))
    with pytest.raises(DoRAError, match="adapted layers already"):
        divide_tensors(model, member(0, 2))


@pytest.mark.parametrize("rank", [0, 1])
def test_rows_in_segments_are_refused(make_tiny_model: Make, rank: int) -> None:
    model: Any = make_tiny_model()

    def shard(self: Any, group: Any) -> None:
        mlp = self.model.layers[0].mlp
        mlp.up_proj = shard_linear(
            mlp.up_proj, "all-to-sharded", segments=2, group=group
        )

    model.__class__ = type("Model", (type(model),), {"shard": shard})
    with pytest.raises(DoRAError, match=r"layers\.0\.mlp\.up_proj is divided in segm"):
        divide_tensors(model, member(rank, 2))
