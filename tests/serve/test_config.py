from pathlib import Path
from typing import Any

import pytest

from mlx_dora.errors import DoRAError
from mlx_dora.serve.config import ServeConfig, check_name


def test_folders_by_name(tmp_path: Path) -> None:
    config = ServeConfig(adapter=("a=x/y=z", "b.1=~/q"), adapter_root=str(tmp_path))
    assert config.folders() == {"a": Path("x/y=z"), "b.1": Path.home() / "q"}
    assert config.root() == tmp_path


@pytest.mark.parametrize(
    "name", ["", " ", "-a", "../a", "a b", "a" * 201, "é", 5, None]
)
def test_a_name_is_a_short_word(name: object) -> None:
    with pytest.raises(DoRAError, match="an adapter's name must have"):
        check_name(name)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("max_adapters", 0),
        ("max_body", 0),
        ("max_prompt_tokens", 0),
        ("max_new_tokens", 0),
        ("max_queue", -1),
        ("drain_seconds", -1.0),
    ],
)
def test_a_limit_out_of_range_is_refused(option: str, value: Any) -> None:
    with pytest.raises(DoRAError, match=option):
        ServeConfig(**{option: value})
