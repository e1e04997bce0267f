from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from mlx_dora.adapters.config import DoRAConfig
from mlx_dora.adapters.surgery import (
    adapter_layers,
    apply_dora,
    apply_layers,
    disabled,
    dora_layers,
    remove_dora,
)
from mlx_dora.errors import DoRAError
from mlx_dora.layers import DoRAEmbedding, DoRALinear

TOKENS = mx.array([[1, 5, 9, 200]])
QV = ("self_attn.q_proj", "self_attn.v_proj")
ALL_IN_BLOCK = 7


def perturb(model: nn.Module) -> None:
    """Give every adapter a real update, as if it had been trained."""
    mx.random.seed(7)
    for _, layer in dora_layers(model):
        layer.lora_b = mx.random.normal(layer.lora_b.shape) * 0.1
        layer.m = layer.m * 1.1


def same(a: mx.array, b: mx.array) -> bool:
    return bool(mx.array_equal(a, b))


def test_default_adapts_every_linear_of_the_last_blocks(tiny_model: nn.Module) -> None:
    paths = apply_dora(tiny_model, DoRAConfig(num_layers=1))
    assert len(paths) == ALL_IN_BLOCK
    assert all(path.startswith("model.layers.1.") for path in paths)
    assert [path for path, _ in dora_layers(tiny_model)] == sorted(paths)
    remove_dora(tiny_model)
    assert len(apply_dora(tiny_model, DoRAConfig(num_layers=-1))) == 2 * ALL_IN_BLOCK


def test_no_layers_adapts_none(tiny_model: nn.Module) -> None:
    assert apply_dora(tiny_model, DoRAConfig(num_layers=0)) == []
    assert apply_dora(tiny_model, DoRAConfig(num_layers=0, keys=QV)) == []
    assert dora_layers(tiny_model) == []


def test_too_many_layers_are_refused(tiny_model: nn.Module) -> None:
    with pytest.raises(DoRAError, match="num_layers is 3, but the model has only 2"):
        apply_dora(tiny_model, DoRAConfig(num_layers=3))


def test_keys_are_relative_or_full(tiny_model: nn.Module) -> None:
    keys = ("self_attn.q_proj", "model.embed_tokens", "model.layers.0.mlp.up_proj")
    assert apply_dora(tiny_model, DoRAConfig(num_layers=1, keys=keys)) == [
        "model.embed_tokens",
        "model.layers.0.mlp.up_proj",
        "model.layers.1.self_attn.q_proj",
    ]
    layers = dict(dora_layers(tiny_model))
    assert isinstance(layers["model.embed_tokens"], DoRAEmbedding)


def test_full_paths_need_no_blocks() -> None:
    model = nn.Module()
    model.head = nn.Linear(4, 4)
    assert apply_dora(model, DoRAConfig(rank=4, keys=("head",))) == ["head"]
    remove_dora(model)
    with pytest.raises(DoRAError, match=r"no blocks in .layers"):
        apply_dora(model, DoRAConfig())


def test_blocks_may_be_the_layers_themselves() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    config = DoRAConfig(rank=4, num_layers=-1)
    assert apply_dora(model, config) == ["layers.0", "layers.2"]


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("self_attn.qproj", "self_attn.qproj.*did you mean self_attn.q_proj"),
        ("model.layers.7.self_attn.q_proj", "no module is called"),
        ("xyz", "no module is called 'xyz'"),
    ],
)
def test_key_that_matches_nothing_is_refused(
    tiny_model: nn.Module, key: str, message: str
) -> None:
    config = DoRAConfig(num_layers=2, keys=(*QV, key))
    with pytest.raises(DoRAError, match=message):
        apply_dora(tiny_model, config)
    assert dora_layers(tiny_model) == []


def test_key_outside_the_chosen_blocks_is_refused(tiny_model: nn.Module) -> None:
    blocks = tiny_model["model"]["layers"]
    blocks[0].extra = nn.Linear(4, 4)
    with pytest.raises(DoRAError, match="'extra' is in none of the last 1 blocks"):
        apply_dora(tiny_model, DoRAConfig(num_layers=1, keys=("extra",)))


def test_modules_that_cannot_take_dora_are_named(tiny_model: nn.Module) -> None:
    class Doubling(nn.Linear):
        def __call__(self, x: mx.array) -> mx.array:
            return 2 * super().__call__(x)

    tiny_model["model"]["layers"][1].mlp.up_proj = Doubling(32, 64)
    with pytest.raises(DoRAError) as caught:
        apply_dora(tiny_model, DoRAConfig(num_layers=1))
    assert "model.layers.1.mlp.up_proj" in str(caught.value)
    assert "Doubling cannot take DoRA" in str(caught.value)
    with pytest.raises(DoRAError, match=r"RMSNorm cannot.*Attention cannot"):
        apply_dora(
            tiny_model, DoRAConfig(num_layers=1, keys=("self_attn", "input_layernorm"))
        )
    assert dora_layers(tiny_model) == []


def test_unknown_experts_are_refused_not_skipped(tiny_model: nn.Module) -> None:
    from mlx_lm.models.switch_layers import SwitchLinear

    class NewExperts(SwitchLinear):
        __module__ = SwitchLinear.__module__

    tiny_model["model"]["layers"][1].mlp.experts = NewExperts(32, 64, 4)
    with pytest.raises(DoRAError, match=r"mlp.experts: .*NewExperts cannot take DoRA"):
        apply_dora(tiny_model, DoRAConfig(num_layers=1))


def test_a_refused_class_is_told_once_with_its_modules(tiny_model: nn.Module) -> None:
    from mlx_lm.models.afm7 import FusedLinear

    for block in tiny_model["model"]["layers"]:
        block.self_attn.q_proj = FusedLinear(32, [16, 16])
    with pytest.raises(DoRAError) as caught:
        apply_dora(tiny_model, DoRAConfig(num_layers=-1))
    assert str(caught.value).startswith(
        "model.layers.0.self_attn.q_proj, model.layers.1.self_attn.q_proj: "
        "mlx_lm.models.afm7.FusedLinear cannot take DoRA; supported are exactly "
    )
    assert str(caught.value).count("cannot take DoRA") == 1
    assert str(caught.value).endswith("Leave them out by giving keys.")


def test_packed_linears_that_only_their_class_reads_are_refused_not_skipped(
    tiny_model: nn.Module,
) -> None:
    from mlx_lm.models.bitlinear_layers import BitLinear

    tiny_model["model"]["layers"][1].mlp.up_proj = BitLinear(32, 64, bias=False)
    with pytest.raises(DoRAError, match=r"layers.1.mlp.up_proj: .*BitLinear cannot"):
        apply_dora(tiny_model, DoRAConfig(num_layers=1))
    # Not in a block that is asked for, or not asked for at all.
    keys = ("self_attn.q_proj",)
    assert len(apply_dora(tiny_model, DoRAConfig(num_layers=1, keys=keys))) == 1
    remove_dora(tiny_model)
    tiny_model["model"]["layers"][0].mlp.up_proj = BitLinear(32, 64, bias=False)
    tiny_model["model"]["layers"][1].mlp.up_proj = nn.Linear(32, 64, bias=False)
    assert len(apply_dora(tiny_model, DoRAConfig(num_layers=1))) == ALL_IN_BLOCK


@pytest.mark.parametrize("way", ["dora", "lora", "full"])
def test_a_class_that_forgets_to_start_its_module_is_refused(way: str) -> None:
    class Forgetful(nn.Module):
        def __init__(self) -> None:
            self.layers = [nn.Linear(4, 4)]

    with pytest.raises(DoRAError, match=r"Forgetful .*nn\.Module\.__init__"):
        apply_layers(Forgetful(), DoRAConfig(num_layers=1), way)  # pyright: ignore[reportArgumentType]


def test_reading_the_weight_under_an_adapter_is_refused_by_name(
    tiny_model: nn.Module,
) -> None:
    apply_dora(tiny_model, DoRAConfig(num_layers=1))
    layer = tiny_model["model"]["layers"][1].mlp.up_proj
    with pytest.raises(DoRAError, match=r"layers\.1\.mlp\.up_proj: .*reads its weight"):
        _ = layer.weight
    assert not hasattr(layer, "weight")
    assert not hasattr(layer, "bias")


def test_second_adapter_is_refused(tiny_model: nn.Module) -> None:
    apply_dora(tiny_model, DoRAConfig(num_layers=1))
    with pytest.raises(DoRAError, match="has 7 adapted layers already"):
        apply_dora(tiny_model, DoRAConfig(num_layers=1))


def test_only_the_adapter_is_trainable(tiny_model: nn.Module) -> None:
    paths = apply_dora(tiny_model, DoRAConfig(num_layers=1, keys=QV))
    trainable = {name for name, _ in tree_flatten(tiny_model.trainable_parameters())}
    leaves = ("lora_a", "lora_b", "m")
    assert trainable == {f"{path}.{leaf}" for path in paths for leaf in leaves}


@pytest.mark.parametrize("training", [True, False])
def test_mode_is_the_models(tiny_model: nn.Module, training: bool) -> None:
    tiny_model.train(training)
    apply_dora(tiny_model, DoRAConfig(num_layers=1, dropout=0.5))
    assert all(layer.training == training for _, layer in dora_layers(tiny_model))


def test_rank_pattern_sets_single_ranks(tiny_model: nn.Module) -> None:
    pattern = {"q_proj": 3, "model.layers.0.self_attn.q_proj": 5}
    apply_dora(tiny_model, DoRAConfig(num_layers=2, keys=QV, rank_pattern=pattern))
    ranks = {path: layer.lora_a.shape[1] for path, layer in dora_layers(tiny_model)}
    assert ranks == {
        "model.layers.0.self_attn.q_proj": 5,
        "model.layers.0.self_attn.v_proj": 8,
        "model.layers.1.self_attn.q_proj": 3,
        "model.layers.1.self_attn.v_proj": 8,
    }


def test_rank_pattern_that_matches_nothing_is_refused(tiny_model: nn.Module) -> None:
    with pytest.raises(DoRAError, match=r"rank_pattern matches no .*'q_pro'"):
        apply_dora(tiny_model, DoRAConfig(num_layers=1, rank_pattern={"q_pro": 3}))


def test_rslora_scales_by_rank(tiny_model: nn.Module) -> None:
    config = DoRAConfig(
        num_layers=1, keys=QV, rank=4, scale=8.0, use_rslora=True,
        rank_pattern={"v_proj": 16},
    )  # fmt: skip
    apply_dora(tiny_model, config)
    assert [layer.scale for _, layer in dora_layers(tiny_model)] == [4.0, 2.0]


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_base_comes_back_bit_for_bit(
    make_tiny_model: Callable[..., nn.Module], bits: int | None, dtype: mx.Dtype
) -> None:
    model = make_tiny_model(bits=bits, dtype=dtype)
    before = model(TOKENS)
    modules = dict(model.named_modules())
    values = dict(tree_flatten(model.parameters()))
    config = DoRAConfig(num_layers=2, keys=(*QV, "model.embed_tokens"))
    paths = apply_dora(model, config)
    assert same(model(TOKENS), before)
    perturb(model)
    assert not same(model(TOKENS), before)
    with disabled(model):
        assert same(model(TOKENS), before)
    assert not same(model(TOKENS), before)
    assert remove_dora(model) == paths
    assert same(model(TOKENS), before)
    again = dict(model.named_modules())
    assert modules.keys() == again.keys()
    assert all(again[path] is module for path, module in modules.items())
    found = dict(tree_flatten(model.parameters()))
    assert all(found[name] is value for name, value in values.items())


def test_disabled_restores_after_an_exception(tiny_model: nn.Module) -> None:
    apply_dora(tiny_model, DoRAConfig(num_layers=1))
    perturb(tiny_model)
    adapted = tiny_model(TOKENS)
    dora_layers(tiny_model)[0][1].enabled = False
    partly = tiny_model(TOKENS)
    assert not same(partly, adapted)
    with pytest.raises(KeyError), disabled(tiny_model):
        raise KeyError
    assert same(tiny_model(TOKENS), partly)


def test_lora_covers_the_same_modules(tiny_model: nn.Module) -> None:
    config = DoRAConfig(num_layers=2, keys=QV, rank_pattern={"q_proj": 3}, scale=2.0)
    base = tiny_model(TOKENS)
    paths = apply_layers(tiny_model, config, "lora")
    assert paths == [path for path, _ in adapter_layers(tiny_model)]
    for path, layer in adapter_layers(tiny_model):
        assert type(layer).__name__ == "LoRALinear"
        assert layer["lora_a"].shape[1] == (3 if "q_proj" in path else 8)
        layer["lora_b"] = mx.ones(layer["lora_b"].shape)
    trainable = tree_flatten(tiny_model.trainable_parameters())
    assert len(trainable) == 2 * len(paths)
    assert not same(tiny_model(TOKENS), base)
    with disabled(tiny_model):
        assert same(tiny_model(TOKENS), base)
    assert not same(tiny_model(TOKENS), base)
    remove_dora(tiny_model)
    assert same(tiny_model(TOKENS), base)
    assert apply_dora(tiny_model, config) == paths


def test_full_unfreezes_the_last_blocks(tiny_model: nn.Module) -> None:
    assert apply_layers(tiny_model, DoRAConfig(num_layers=1), "full") == [
        "model.layers.1"
    ]
    names = [name for name, _ in tree_flatten(tiny_model.trainable_parameters())]
    assert names
    assert all(name.startswith("model.layers.1.") for name in names)
    assert apply_layers(tiny_model, DoRAConfig(num_layers=0), "full") == []
    assert tree_flatten(tiny_model.trainable_parameters()) == []


def test_unknown_fine_tune_type_is_refused(tiny_model: nn.Module) -> None:
    with pytest.raises(DoRAError, match="must be dora, lora, full; got 'qlora'"):
        apply_layers(tiny_model, DoRAConfig(), "qlora")  # pyright: ignore[reportArgumentType]


def test_order_is_natural(make_tiny_model: Callable[..., nn.Module]) -> None:
    model = make_tiny_model(num_hidden_layers=12)
    paths = apply_dora(model, DoRAConfig(num_layers=-1, keys=("mlp.up_proj",)))
    assert paths == [f"model.layers.{i}.mlp.up_proj" for i in range(12)]
    assert [path for path, _ in dora_layers(model)] == paths
    assert all(isinstance(layer, DoRALinear) for _, layer in dora_layers(model))


def test_full_fine_tuning_of_a_quantised_model_is_refused(
    make_tiny_model: Callable[..., nn.Module],
) -> None:
    model = make_tiny_model(bits=4)
    with pytest.raises(DoRAError, match=r"must not be quantised as in model.layers.1"):
        apply_layers(model, DoRAConfig(num_layers=1), "full")
