import json
from pathlib import Path
from typing import Any

import pytest

from mlx_dora.errors import DoRAError
from mlx_dora.peft.config_file import read_peft_config

GOOD = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}


def read(folder: Path, **changes: Any) -> Any:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**GOOD, **changes}))
    return read_peft_config(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("r", 0),
        ("r", "8"),
        ("r", 2.5),
        ("lora_alpha", "x"),
        ("lora_alpha", float("nan")),
        ("lora_dropout", 1.5),
        ("use_dora", "yes"),
        ("rank_pattern", "x"),
        ("rank_pattern", [1]),
        ("rank_pattern", {"q_proj": 0}),
        ("rank_pattern", {"*q_proj": 4}),
        ("alpha_pattern", {"q_proj": float("inf")}),
        ("alpha_pattern", {"(": 4}),
        ("target_modules", "*.q_proj"),
        ("target_modules", [1]),
        ("exclude_modules", 5),
        ("layers_to_transform", ["a"]),
        ("layers_pattern", ["("]),
    ],
)
def test_a_value_of_a_wrong_type_or_range_is_named(
    tmp_path: Path, key: str, value: Any
) -> None:
    with pytest.raises(DoRAError, match=rf"adapter_config\.json: {key}"):
        read(tmp_path, **{key: value})


def test_a_number_too_large_for_a_float_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DoRAError, match="too large a number"):
        read(tmp_path, lora_alpha=10**400)


def test_null_means_pefts_default(tmp_path: Path) -> None:
    config = read(tmp_path, rank_pattern=None, alpha_pattern=None, use_dora=None)
    assert (config.rank_pattern, config.use_dora) == ({}, False)


def test_an_alpha_of_zero_stays_zero(tmp_path: Path) -> None:
    assert read(tmp_path, lora_alpha=0).scale_of("a.q_proj") == 0.0
