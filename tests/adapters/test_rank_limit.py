"""Making an adapter of a rank above min(out, in) is refused; loading one is not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_dora.adapters.adapter import Adapter
from mlx_dora.adapters.attach import attach_adapter
from mlx_dora.adapters.config import DoRAConfig
from mlx_dora.adapters.files import save_adapter
from mlx_dora.adapters.surgery import apply_dora, apply_layers, dora_layers
from mlx_dora.errors import DoRAError
from mlx_dora.merge.adapters import merge_adapters
from mlx_dora.merge.adapters.extract import extract_adapter
from tests.adapters.training import TOKENS
from tests.checks import assert_close, to_numpy

K = "self_attn.k_proj"  # (16, 32)
Q0 = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("fine_tune_type", ["dora", "lora"])
@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"rank": 2_000_000}, "rank of at most 32, got 2000000"),
        ({"rank": 33}, "rank of at most 32, got 33"),
        ({"rank": 17, "keys": (K,)}, f"{K} has shape .16, 32.: .* at most 16, got 17"),
        ({"rank_pattern": {K: 17}}, f"{K} has shape .16, 32.: .* at most 16, got 17"),
    ],
)
def test_a_rank_that_adds_nothing_is_refused(
    tiny_model: nn.Module, settings: dict[str, Any], named: str, fine_tune_type: Any
) -> None:
    before = [type(module) for module in tiny_model.modules()]
    with pytest.raises(DoRAError, match=named):
        apply_layers(tiny_model, DoRAConfig(num_layers=1, **settings), fine_tune_type)
    assert [type(module) for module in tiny_model.modules()] == before


@pytest.mark.parametrize(
    "variant", ["doran", "doran-aux", "map", "prediag", "adaptive", "edora", "bidora"]
)
def test_a_variant_has_the_same_limit(tiny_model: nn.Module, variant: Any) -> None:
    config = DoRAConfig(rank=17, num_layers=1, keys=(K,), variant=variant)
    with pytest.raises(DoRAError, match="at most 16, got 17"):
        apply_dora(tiny_model, config)


def test_pissa_has_the_same_limit_for_each_half(tiny_model: nn.Module) -> None:
    keys, layers = (K,), 1
    with pytest.raises(DoRAError, match="at most 16, got 17"):
        apply_dora(
            tiny_model, DoRAConfig(rank=17, num_layers=layers, keys=keys, init="pissa")
        )
    apply_dora(
        tiny_model, DoRAConfig(rank=16, num_layers=layers, keys=keys, init="pissa")
    )
    layers = dict(dora_layers(tiny_model))
    (layer,) = [one for path, one in layers.items() if path.endswith("k_proj")]
    lora_a, _ = layer.factors()
    assert lora_a.shape == (32, 32)


def test_the_limit_itself_and_a_magnitude_alone_are_fine(tiny_model: nn.Module) -> None:
    config = DoRAConfig(
        rank=32, num_layers=1, keys=("self_attn.q_proj",), magnitude_keys=(K,)
    )
    assert len(apply_dora(tiny_model, config)) == 2


def test_a_small_module_among_all_takes_the_rank_of_the_rest(
    tiny_model: nn.Module,
) -> None:
    # As the gate with one output of Qwen2-MoE: nobody named it.
    assert apply_dora(tiny_model, DoRAConfig(rank=20, num_layers=1))


def test_an_adapter_of_a_larger_rank_made_elsewhere_computes(
    make_tiny_model: Callable[..., nn.Module],
) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((32, 40)), 0.01 * rng.standard_normal((40, 32))
    model = make_tiny_model()
    weight = dict(model.named_modules())[Q0].weight
    turned = to_numpy(weight) + 2 * (a @ b).T
    m = np.linalg.norm(to_numpy(weight), axis=1)
    leaves = {"lora_a": a, "lora_b": b, "m": m}
    config = DoRAConfig(rank=40, scale=2.0, keys=(Q0,), num_layers=2)
    adapter = Adapter(
        config=config,
        tensors={
            f"{Q0}.{leaf}": mx.array(value.astype(np.float32))
            for leaf, value in leaves.items()
        },
    )
    attach_adapter(model, adapter)
    plain = make_tiny_model()
    exact = m[:, None] * turned / np.linalg.norm(turned, axis=1, keepdims=True)
    dict(plain.named_modules())[Q0].weight = mx.array(exact.astype(np.float32))
    assert_close(model(TOKENS), to_numpy(plain(TOKENS)), bound=1e-4)


def test_a_cut_above_every_matrix_is_refused(
    make_tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    from mlx_dora.adapters.hosting import load

    base, tuned = make_tiny_folder("base"), make_tiny_folder("tuned", seed=1)
    model, _ = load(base)
    apply_dora(model, DoRAConfig(rank=4, num_layers=2, keys=("self_attn.q_proj", K)))
    save_adapter(model, tmp_path / "a")
    with pytest.raises(DoRAError, match=r"q_proj has shape .32, 32.: .* got 33; lower"):
        merge_adapters([tmp_path / "a"] * 2, model=base, rank=33)
    assert merge_adapters([tmp_path / "a"] * 2, model=base, rank=20).config.rank <= 20
    with pytest.raises(DoRAError, match="at most 32, got 2000000"):
        extract_adapter(base, tuned, rank=2_000_000)
    extracted = extract_adapter(base, tuned, rank=20, keys=(K, "self_attn.q_proj"))
    assert extracted.adapter.config.rank == 20
    assert extracted.adapter.config.rank_of(f"model.layers.0.{K}") == 16
