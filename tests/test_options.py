import math
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from mlx_dora.errors import DoRAError
from mlx_dora.options import check_options, names_with, option


@dataclass(frozen=True, kw_only=True)
class Config:
    count: int = option(1, help="", least=1, special=(-1,), recorded=True)
    rate: float = option(0.5, help="", above=0, below=1, may_change=True)
    size: float = option(2.0, help="")
    kind: Literal["a", "b", "c"] = option("a", help="")
    name: str | None = option(None, help="", may_change=True)
    flag: bool = option(False, help="")
    table: dict[str, int] | None = option(None, help="")

    def __post_init__(self) -> None:
        check_options(self)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"count": 0}, "count must be -1 or at least 1, got 0."),
        ({"count": 1.0}, "count must be a whole number, got 1.0."),
        ({"count": True}, "count must be a whole number, got True."),
        ({"rate": 1}, "rate must be above 0 and below 1, got 1."),
        ({"rate": math.nan}, "rate must be above 0 and below 1, got nan."),
        ({"rate": "1"}, "rate must be a finite number above 0 and below 1, got '1'."),
        ({"size": math.inf}, "size must be a finite number, got inf."),
        ({"kind": "d"}, "kind must be a, b or c, got 'd'."),
        ({"name": 3}, "name must be text, got 3."),
        ({"flag": 1}, "flag must be true or false, got 1."),
        ({"table": [1]}, "table must be a mapping, got [1]."),
        ({"count": None}, "count must be a whole number, got None."),
    ],
)
def test_a_bad_value_is_refused_with_what_is_allowed(
    fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(DoRAError) as caught:
        Config(**fields)
    assert str(caught.value) == message


def test_good_and_special_values_pass() -> None:
    config = Config(count=-1, rate=0.1, size=3, kind="c", name="n", table={"a": 1})
    assert (config.count, config.size, config.table) == (-1, 3, {"a": 1})


def test_the_facts_of_fields_are_listed_by_name() -> None:
    assert names_with(Config, "recorded") == ["count"]
    assert names_with(Config(), "may_change") == ["rate", "name"]
