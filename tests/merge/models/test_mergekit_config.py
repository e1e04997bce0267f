"""Reading mergekit's YAML."""

import numpy as np
import pytest

from mlx_dora.errors import DoRAError
from mlx_dora.merge.models.mergekit import read_mergekit
from mlx_dora.merge.models.settings import depth_of, resolve
from tests.merge.models.places import settings_of


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


def test_a_models_own_parameter_takes_precedence():
    entries = [
        {"model": "a", "parameters": {"weight": [{"filter": "mlp", "value": 3}]}},
        {"model": "b"},
    ]
    plan = read_mergekit(config(models=entries, parameters={"weight": 1}))
    weights = settings_of(plan, "model.layers.0.mlp.up_proj.weight", 4, 2).weights
    assert weights.tolist() == [3, 1]
    assert settings_of(plan, "model.norm.weight", 1, 2).weights.tolist() == [1, 1]


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
    assert np.allclose(settings_of(plan, "x", 1, 1).weights, [0.75, 0.25])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"merge_method": "ram"}, "merge_method 'ram'"),
        ({"merge_method": "sce"}, "sce needs a base"),
        ({"merge_method": ["ties"]}, r"merge_method must be text, got \['ties'\]"),
        ({"merge_method": None}, "merge_method None"),
        ({"dtype": ["float32"]}, "dtype must be text"),
        ({"out_dtype": 32}, "out_dtype must be text, got 32"),
        ({"base_model": ["a"]}, "base_model must be text"),
        ({"chat_template": 5}, "chat_template must be text"),
        ({"tokenizer_source": {}}, "tokenizer_source must be text"),
        ({"tokenizer": "a"}, "tokenizer must be a mapping"),
        ({"tokenizer": {"tokens": {"x": 1}}}, "x must be a mapping, got 1"),
        ({"tokenizer": {"tokens": {"x": {}}}}, "x needs a source"),
        (
            {"tokenizer": {"tokens": {"x": {"source": {"kind": "mean"}}}}},
            "source must be a model, kind: zero",
        ),
        (
            {"tokenizer": {"tokens": {"x": {"source": "a", "force": 1}}}},
            "force must be true or false",
        ),
        ({"tokenizer": {"pad_to_multiple_of": 0}}, "pad_to_multiple_of must be"),
        ({"tokenizer": {"pad": 8}}, "unknown pad"),
        ({"tokenizer": {}, "tokenizer_source": "a"}, "not both"),
        ({"slices": []}, "one of models:, slices: and modules:, got models, slices"),
        ({"models": None}, "got none of them"),
        ({"parameters": [1]}, "parameters must be a mapping"),
        ({"parameters": {"weight": 10**400}}, "weight must be a number"),
        ({"parameters": {"weight": float("nan")}}, "weight must be a number"),
        ({"parameters": {"weight": [{"filter": 5, "value": 1}]}}, "weight must be"),
        ({"parameters": {"wait": 1}}, "wait is unknown; linear uses weight"),
        ({"models": "a"}, "needs models"),
        ({"models": [{"model": "a", "params": {}}]}, "models: a: unknown params"),
        ({"models": [{"model": "a+b+c"}]}, "expected a model or model.adapter"),
        ({"base_model": "c"}, "base_model c counts as a model.* has no weight"),
        (
            {
                "base_model": "c",
                "merge_method": "passthrough",
                "models": [{"model": "a"}],
            },
            "passthrough uses one model, got a and base_model c",
        ),
        ({"dtype": "int8"}, "dtype must be"),
        ({"parameters": {"weight": "much"}}, "weight must be a number"),
        ({"parameters": {"weight": [{"valu": 1}]}}, "weight must be a number"),
        (
            {"merge_method": "slerp", "models": [{"model": "a"}, {"model": "b"}]},
            "slerp needs base_model",
        ),
        ({"merge_method": "ties"}, "ties needs a base"),
    ],
)
def test_unknown_keys_and_bad_values_are_refused(changes, message):
    with pytest.raises(DoRAError, match=message):
        read_mergekit(config(**changes))


def test_parameters_of_other_methods_are_accepted_with_a_note():
    entries = [{"model": m, "parameters": {"weight": 1, "density": 0.2}} for m in "ab"]
    plan = read_mergekit(config(models=entries, parameters={"dtype": "float16"}))
    assert [note.split(":")[0] for note in plan.notes] == [
        "parameters", "parameters of a", "parameters of b",
    ]  # fmt: skip
    assert plan.notes[1] == "parameters of a: density has no effect on linear."
    assert plan.dtype is None


def test_a_shared_parameter_of_one_model_gets_a_note():
    """mergekit reads it only under the file, the module or the slice."""
    entries = [{"model": "a", "parameters": {"weight": 1, "normalize": False}}]
    plan = read_mergekit(config(models=entries))
    assert "normalize has no effect there, as in mergekit" in plan.notes[0]
    assert settings_of(plan, "x", 1, 1).normalize is None


def test_a_base_that_is_not_listed_counts_as_a_model():
    """As in mergekit, with the weight of the file."""
    entries = [{"model": "a"}, {"model": "b"}]
    changes = {"base_model": "c", "models": entries, "parameters": {"weight": 2}}
    plan = read_mergekit(config(**changes))
    assert plan.models == ("a", "b", "c")
    assert settings_of(plan, "x", 1, 1).weights.tolist() == [2, 2, 2]
    assert plan.notes == ("linear: base_model c counts as one of the models.",)


@pytest.mark.parametrize(
    ("method", "own", "expected"),
    [
        ("breadcrumbs", {"gamma": 0.2}, {"gamma": (0.2, 0.05)}),
        ("della", {"epsilon": 0.1}, {"epsilon": (0.1, 0.05)}),
        ("sce", {}, {"select_topk": 0.3}),
    ],
)
def test_a_methods_own_parameters(method, own, expected):
    """Per model, or of the file; a shared one cannot be set for a model."""
    shared = dict.fromkeys(own, 0.05) or {"select_topk": 0.3}
    entries = [
        {"model": "a", "parameters": {"weight": 1, **own}},
        {"model": "b", "parameters": {"weight": 1}},
    ]
    plan = read_mergekit(
        config(merge_method=method, base_model="c", models=entries, parameters=shared)
    )
    assert settings_of(plan, "x", 1, 1).own == expected


def source(model, first=0, end=2):
    return {"model": model, "layer_range": [first, end]}


@pytest.mark.parametrize(
    ("slices", "message"),
    [
        ([{"sources": [source("a"), source("b", 0, 3)]}], r"got \[0, 2\], \[0, 3\]"),
        ([{"sources": [source("a", 2, 2)]}], "at least 1, in every source"),
        ([{"sources": [source("a", -1)]}], "same number of blocks"),
        ([{"sources": [source("a"), source("a", 1, 3)]}], "a model is given twice"),
        ([{"sources": [{"model": "a"}]}], "a needs layer_range"),
        ([{"sources": [{**source("a"), "layer_range": ["0", 1]}]}], "needs layer_ra"),
        ([{"sources": 5}], "sources: a list of models"),
        ([5], r"slices\[0\] must be a mapping"),
        ({"a": 1}, "slices must be a list"),
    ],
)
def test_bad_slices_are_refused(slices, message):
    with pytest.raises(DoRAError, match=message):
        read_mergekit({"merge_method": "linear", "slices": slices})


def test_settings_fall_through_from_source_to_slice_to_module_to_file():
    only_mlp = [{"filter": "mlp", "value": 3}]
    first = {**source("a"), "parameters": {"weight": only_mlp}}
    slices = [{"sources": [first, source("b")], "parameters": {
        "weight": {"filter": "attn", "value": [5, 7]}}}]  # fmt: skip
    module = {"slices": slices, "parameters": {"normalize": False}}
    top = {"weight": 2, "normalize": True}
    plan = read_mergekit(
        {"merge_method": "linear", "modules": {"default": module}, "parameters": top}
    )
    (plan,) = plan.parts
    assert (plan.count, plan.starts) == (2, (0, 0))
    for name, weights in (("mlp", [3, 2]), ("self_attn", [7, 7]), ("norm", [2, 2])):
        settings = settings_of(plan, f"model.layers.1.{name}.weight", 4, 2)
        assert settings.weights.tolist() == weights
        assert settings.normalize is False


def test_a_missing_weight_is_named():
    plan = read_mergekit(config(models=[{"model": "a"}, {"model": "b"}]))
    with pytest.raises(DoRAError, match="no weight for x of a, b"):
        settings_of(plan, "x", 1, 1)
