import math
from typing import Any

import pytest

from mlx_dora.adapters.config import DoRAConfig
from mlx_dora.errors import DoRAError


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 0}, "rank must be at least 1, got 0."),
        ({"rank": -3}, "rank must be at least 1, got -3."),
        ({"rank": 2.0}, "rank must be a whole number, got 2.0."),
        ({"rank": True}, "rank must be a whole number, got True."),
        ({"scale": math.nan}, "scale must be a finite number, got nan."),
        ({"scale": math.inf}, "scale must be a finite number, got inf."),
        ({"scale": "2"}, "scale must be a finite number, got '2'."),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0."),
        ({"dropout": -0.1}, "dropout must be at least 0 and below 1, got -0.1."),
        ({"dropout": math.nan}, "dropout must be at least 0 and below 1, got nan."),
        ({"num_layers": -2}, "num_layers must be -1 or at least 0, got -2."),
        ({"num_layers": 1.5}, "num_layers must be a whole number, got 1.5."),
        ({"keys": "q_proj"}, "keys must be a list of module names, got 'q_proj'."),
        ({"keys": []}, "keys must name a module or be left out, got []."),
        ({"keys": ["a", 3]}, "keys must be a list of module names"),
        ({"rank_pattern": {"q": 0}}, "rank_pattern 'q' must be at least 1, got 0."),
        ({"rank_pattern": {"": 1}}, "rank_pattern must name modules, got {'': 1}."),
        ({"rank_pattern": ["q"]}, "rank_pattern must be a mapping"),
        (
            {"variant": "lora"},
            "variant must be dora, doran, doran-aux, map, prediag, magnitude, adap",
        ),
        ({"init": "svd"}, "init must be lora or pissa, got 'svd'."),
        ({"init": "pissa", "variant": "map"}, "init pissa needs variant dora, got"),
        ({"init": "pissa", "scale": -1.0}, "must be above 0; got -1.0."),
        ({"variant": "map", "scale": 0}, "low-rank part by the scale, which is 0."),
        ({"variant": "edora", "scale": 0}, "low-rank part by the scale, which is 0."),
        (
            {"variant": "doran-aux", "aux_width": 0},
            "aux_width must be at least 1, got 0.",
        ),
        (
            {"variant": "doran-aux", "aux_width": 1.5},
            "must be a whole number, got 1.5.",
        ),
        ({"variant": "doran", "aux_width": 2}, "to variant doran-aux, got variant dor"),
        ({"variant": "magnitude", "dropout": 0.1}, "no low-rank part: leave out drop"),
        ({"variant": "magnitude", "rank_pattern": {"a": 2}}, "leave out rank_pattern."),
        ({"magnitude_keys": []}, "magnitude_keys must name a module or be left out"),
        (
            {"keys": ["a", "b"], "magnitude_keys": ["b"]},
            "keys and magnitude_keys both name b.",
        ),
        ({"use_rslora": 1}, "use_rslora must be true or false"),
    ],
)
def test_bad_values_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(DoRAError) as caught:
        DoRAConfig(**fields)
    assert message in str(caught.value)


def test_longest_pattern_wins() -> None:
    config = DoRAConfig(
        rank_pattern={"q_proj": 2, "layers.1.self_attn.q_proj": 4, "proj": 9}
    )
    assert config.rank_of("model.layers.0.self_attn.q_proj") == 2
    assert config.rank_of("model.layers.1.self_attn.q_proj") == 4
    assert config.rank_of("model.layers.1.self_attn.k_proj") == 8  # no dot before proj


def test_rslora_divides_by_the_square_root_of_each_rank() -> None:
    config = DoRAConfig(scale=8, rank=4, rank_pattern={"q": 16}, use_rslora=True)
    assert config.scale_of("k") == 4
    assert config.scale_of("q") == 2


def test_lora_parameters_round_trip() -> None:
    config = DoRAConfig(rank=3, scale=2.5, dropout=0.1, keys=("a", "b"), num_layers=4)
    parameters = config.lora_parameters()
    assert DoRAConfig.from_lora_parameters(parameters, num_layers=4) == config
    assert "keys" not in DoRAConfig().lora_parameters()


def test_unknown_lora_parameter_is_refused() -> None:
    with pytest.raises(DoRAError, match=r"unknown keys alpha;.*uses 'scale'"):
        DoRAConfig.from_lora_parameters({"rank": 8, "alpha": 16})
    with pytest.raises(DoRAError, match="unknown keys ranks; known are rank") as caught:
        DoRAConfig.from_lora_parameters({"ranks": 8})
    assert "alpha" not in str(caught.value)
