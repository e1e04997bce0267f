"""Reading mergekit's YAML."""

import numpy as np
import pytest

from mlx_dora.errors import DoRAError
from mlx_dora.merge.mergekit import read_mergekit
from mlx_dora.merge.settings import depth_of, resolve


def config(**changes):
    entries = [{"model": m, "parameters": {"weight": 1}} for m in ("a", "b")]
    return {"merge_method": "linear", "models": entries, **changes}


def test_gradients_and_filters():
    assert resolve([0, 1, 0.5], "x", 0.25) == 0.5
    assert resolve([0, 1, 0.5], "x", 1.0) == 0.5
    filters = [{"filter": "mlp", "value": [2, 4]}, {"value": 7}]
    assert resolve(filters, "model.layers.1.mlp.up_proj.weight", 0.5) == 3
    assert resolve(filters, "model.norm.weight", 0.0) == 7
    assert resolve(filters[:1], "model.norm.weight", 0.0) is None
    assert depth_of("model.layers.3.mlp.up_proj.weight", 7) == 0.5
    assert depth_of("model.embed_tokens.weight", 7) == 0
    assert depth_of("model.layers.0.mlp.up_proj.weight", 1) == 1


def test_a_models_own_parameter_goes_first_and_falls_through():
    entries = [
        {"model": "a", "parameters": {"weight": [{"filter": "mlp", "value": 3}]}},
        {"model": "b"},
    ]
    plan = read_mergekit(config(models=entries, parameters={"weight": 1}))
    weights = plan.settings_of("model.layers.0.mlp.up_proj.weight", 4, 2).weights
    assert weights.tolist() == [3, 1]
    assert plan.settings_of("model.norm.weight", 1, 2).weights.tolist() == [1, 1]


def test_slerp_starts_at_the_base():
    entries = [{"model": "a"}, {"model": "b"}]
    plan = read_mergekit(
        config(
            merge_method="slerp",
            base_model="b",
            models=entries,
            parameters={"t": 0.25},
            dtype="bfloat16",
        )
    )
    assert plan.models == ("b", "a")
    assert plan.dtype == "bfloat16"
    assert np.allclose(plan.settings_of("x", 1, 1).weights, [0.75, 0.25])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"merge_method": "sce"}, "merge_method 'sce'"),
        ({"slices": []}, "slices not understood"),
        ({"tokenizer_source": "union"}, "tokenizer_source not understood"),
        ({"parameters": {"int8_mask": True}}, "parameters: int8_mask not understood"),
        ({"models": "a"}, "needs models"),
        ({"models": [{"model": "a", "params": {}}]}, "models: a: params not"),
        ({"models": [{"model": "a+b"}]}, "fuse it first"),
        ({"models": [{"model": "a", "parameters": {"density": 1}}]}, "density not"),
        ({"base_model": "c"}, "must be among the models"),
        ({"dtype": "int8"}, "dtype must be"),
        ({"parameters": {"weight": "much"}}, "weight must be a number"),
        ({"parameters": {"weight": [{"valu": 1}]}}, "weight must be a number"),
        ({"merge_method": "slerp"}, "parameters of a: weight not understood"),
        (
            {"merge_method": "slerp", "models": [{"model": "a"}, {"model": "b"}]},
            "slerp needs base_model",
        ),
        ({"merge_method": "ties"}, "ties needs a base"),
    ],
)
def test_what_is_not_understood_is_refused(changes, message):
    with pytest.raises(DoRAError, match=message):
        read_mergekit(config(**changes))


def test_a_missing_weight_is_named():
    plan = read_mergekit(config(models=[{"model": "a"}, {"model": "b"}]))
    with pytest.raises(DoRAError, match="no weight for x of a, b"):
        plan.settings_of("x", 1, 1)
