import math
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from mlx_dora.errors import DoRAError
from mlx_dora.options import check_options, names_with, option, option_problems


@dataclass(frozen=True, kw_only=True)
class Config:
    count: int = option(1, help="", least=1, special=(-1,), recorded=True)
    rate: float = option(0.5, help="", above=0, below=1, may_change=True)
    size: float = option(2.0, help="")
    kind: Literal["a", "b", "c"] = option("a", help="")
    name: str | None = option(None, help="", may_change=True)
    flag: bool = option(False, help="")
    table: dict[str, int] | None = option(None, help="", least=0)
    share: float = option(0.5, help="", least=0, most=1)
    names: str | tuple[str, ...] = option((), help="")
    places: tuple[int, ...] | int = option((), help="", items="places")
    free: dict[str, Any] | list[Any] | None = option(None, help="")

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
        ({"table": {"a": 1, "b": -1}}, "table 'b' must be at least 0, got -1."),
        ({"table": {"a": "1"}}, "table 'a' must be a whole number, got '1'."),
        ({"share": 1.5}, "share must be at least 0 and at most 1, got 1.5."),
        ({"names": ["a", 1]}, "names must be text or a list of texts, got ['a', 1]."),
        (
            {"places": [True]},
            "places must be a list of places or a whole number, got [True].",
        ),
        ({"free": "a"}, "free must be a mapping or a list, got 'a'."),
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
    config = Config(share=1, names=["a"], places=3, free=[None])  # pyright: ignore[reportArgumentType]
    assert (config.share, config.places) == (1, 3)


def test_all_problems_are_listed() -> None:
    config = Config()
    for name, value in {"count": 0, "flag": 3}.items():
        object.__setattr__(config, name, value)
    assert [text.partition(" ")[0] for text in option_problems(config)] == [
        "count",
        "flag",
    ]


def test_the_facts_of_fields_are_listed_by_name() -> None:
    assert names_with(Config, "recorded") == ["count"]
    assert names_with(Config(), "may_change") == ["rate", "name"]
