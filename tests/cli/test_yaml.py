from pathlib import Path

import pytest

from mlx_dora.cli._yaml import parse_yaml, read_yaml
from mlx_dora.errors import DoRAError

BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("? [a, b]\n: c\n", "unhashable key"),
        ("a: " + "[" * 3000 + "]" * 3000, "nested deeper than 50 levels"),
        ("- " * 3000 + "a", "nested deeper than 50 levels"),
        ("{" * 3000, "nested deeper than 50 levels"),
        ("a: &a [*a]", "the alias 'a' holds itself"),
        (BOMB, "more than 1,000,000 values"),
        ("a: " + "9" * 400, "a number is too large"),
        ("a: 0x" + "f" * 5000, "a number is too large"),
        ("a: " + "9" * 5000, "not valid YAML"),
        ("a: !!bool maybe", "not valid YAML"),
        ("a: !!int ''", "not valid YAML"),
        ("a: !!timestamp x", "not valid YAML"),
        ("a: !!python/name:os.system x", "not valid YAML"),
        ("a: 1\na: 2", "key 'a' is given twice"),
        ("a: [", "not valid YAML"),
        ("a: \x07", "not valid YAML"),
    ],
)
def test_what_is_no_usable_yaml_is_one_line(text: str, reason: str) -> None:
    with pytest.raises(DoRAError, match=reason) as caught:
        parse_yaml(text, "c.yaml")
    assert str(caught.value).startswith("c.yaml is not valid YAML: ")
    assert len(str(caught.value)) < 700


def test_a_date_is_text_whether_it_exists_or_not() -> None:
    assert parse_yaml("a: 2020-99-99\nb: 2020-01-01", "it") == {
        "a": "2020-99-99",
        "b": "2020-01-01",
    }


def test_anchors_and_a_byte_order_mark_are_read() -> None:
    text = "\ufeffa: &w {weight: 0.5}\nb: [*w, *w]\nc: {<<: *w, d: 1e-5}"
    assert parse_yaml(text, "it") == {
        "a": {"weight": 0.5},
        "b": [{"weight": 0.5}] * 2,
        "c": {"weight": 0.5, "d": 1e-5},
    }


def test_a_merged_key_may_be_overridden() -> None:
    text = "a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}"
    assert parse_yaml(text, "it") == {
        "a": {"x": 1, "y": 2},
        "b": {"x": 3, "y": 2},
    }


def test_several_documents_are_refused_in_words_of_their_own() -> None:
    with pytest.raises(DoRAError, match=r"it holds several YAML documents \(---\)"):
        parse_yaml("a: 1\n---\nb: 2", "it")
    with pytest.raises(DoRAError, match="it is not valid YAML"):
        parse_yaml("a: *nowhere", "it")


def test_a_file_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_bytes(b"a: \xff")
    with pytest.raises(DoRAError, match=r"c\.yaml is not valid YAML: 'utf-8' codec"):
        read_yaml(tmp_path / "c.yaml")
