import pytest

from mlx_dora.errors import DoRAError
from mlx_dora.io.json import parse, read_object


def test_a_byte_order_mark_is_skipped(tmp_path):
    (tmp_path / "c.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_object(tmp_path / "c.json") == {"a": 1}


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[" * 100_000, b"\xff\xfe{", b'{"a": ' + b"9" * 5000 + b"}"],
    ids=["empty", "cut", "deep", "not-utf8", "long-number"],
)
def test_what_is_not_json_is_refused_with_the_file(tmp_path, content):
    path = tmp_path / "c.json"
    path.write_bytes(content)
    with pytest.raises(DoRAError, match=r"c\.json is not"):
        read_object(path)


def test_an_object_is_expected(tmp_path):
    (tmp_path / "c.json").write_text("[1]")
    with pytest.raises(DoRAError, match=r"must hold a JSON object, got \[1\]"):
        read_object(tmp_path / "c.json")


def test_the_error_names_a_line():
    with pytest.raises(DoRAError, match=r"rows\.jsonl, line 3 is not JSON"):
        parse("{", "rows.jsonl, line 3")
