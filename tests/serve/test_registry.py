import pytest

from mlx_dora.errors import DoRAError
from mlx_dora.serve.paths import DEFAULT, NotServedError
from mlx_dora.serve.registry import Registry, Served


def registry() -> Registry:
    made = Registry(["org/base", "/models/base"])
    for key, name in enumerate(("ada", "bob"), start=1):
        assert made.put(Served(name=name, key=key)) is None
    return made


@pytest.mark.parametrize(
    ("model", "adapters", "name"),
    [
        (DEFAULT, None, ""),
        ("org/base", None, ""),
        ("/models/base", "bob", "bob"),
        (DEFAULT, "ada", "ada"),
        ("ada", None, "ada"),
        ("ada", "ada", "ada"),
    ],
)
def test_a_request_chooses(model: str, adapters: str | None, name: str) -> None:
    assert registry().choose(model, adapters).name == name


def test_unknown_and_ambiguous_names_are_refused() -> None:
    with pytest.raises(NotServedError, match="served are: org/base, ada, bob"):
        registry().choose("eve", None)
    with pytest.raises(NotServedError):
        registry().choose(DEFAULT, "org/base")
    with pytest.raises(DoRAError, match="names two adapters"):
        registry().choose("ada", "bob")


def test_a_replaced_adapter_is_handed_back() -> None:
    made = registry()
    before = made.put(Served(name="ada", key=9))
    assert before is not None
    assert (before.key, made.choose("ada", None).key) == (1, 9)
    assert made.pop("ada") == Served(name="ada", key=9)
    assert made.pop("ada") is None
    assert made.names == ["bob"]
