import json
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_dora.errors import DoRAError
from mlx_dora.io.header import read_header


def write(path: Path, header: object, data: bytes = b"", pad: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data + pad)
    return path


def entry(start: int, end: int, shape: object = None, dtype: str = "F32") -> dict:
    shape = [(end - start) // 4] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def test_a_name_with_half_a_surrogate_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", {"a\ud800": entry(0, 4)}, bytes(4))
    with pytest.raises(DoRAError, match="invalid JSON"):
        read_header(path)


@pytest.mark.parametrize("size", [2**63, 10**4000])
def test_a_size_beyond_any_file_is_refused(tmp_path: Path, size: int) -> None:
    path = write(tmp_path / "a.safetensors", {"a": entry(0, 4, [size])}, bytes(4))
    with pytest.raises(DoRAError, match=r"overflow|out of range"):
        read_header(path)


def test_a_size_that_mlx_would_wrap_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", {"a": entry(0, 0, [2**31 - 1, 0])})
    assert read_header(path)["a"].shape == (2**31 - 1, 0)
    write(path, {"a": entry(0, 0, [2**31, 0])})
    with pytest.raises(DoRAError, match=r"'a' has the shape \[2147483648, 0\]"):
        read_header(path)


@pytest.mark.parametrize("extra", [b"[" * 100_000, b"1" * 5000], ids=["deep", "long"])
def test_values_that_safetensors_skips_do_not_break_the_reader(
    tmp_path: Path, extra: bytes
) -> None:
    extra += b"]" * extra.count(b"[")
    tensor = json.dumps(entry(0, 4)).encode()[:-1] + b', "x": ' + extra + b"}"
    path = write(tmp_path / "a.safetensors", b'{"a": ' + tensor + b"}", bytes(4))
    with pytest.raises(DoRAError, match="not a valid safetensors file"):
        read_header(path)


def test_reads_files_that_mlx_writes(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    mx.save_safetensors(
        str(path),
        {
            "w": mx.ones((2, 3), dtype=mx.bfloat16),
            "scalar": mx.array(1.0),
            "none": mx.zeros((0, 4)),
        },
    )
    infos = read_header(path)
    assert infos["w"].dtype == "BF16"
    assert infos["w"].shape == (2, 3)
    assert infos["w"].nbytes == 12
    assert infos["scalar"].shape == ()
    assert infos["none"].nbytes == 0
    raw = path.read_bytes()[infos["w"].start : infos["w"].end]
    assert raw == b"\x80\x3f" * 6


def test_a_file_without_tensors_has_an_empty_header(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    mx.save_safetensors(str(path), {})
    assert read_header(path) == {}


@pytest.mark.parametrize(
    ("header", "data", "reason"),
    [
        ({"a": entry(0, 8), "b": entry(4, 12)}, 12, "invalid offset for tensor `b`"),
        ({"a": entry(0, 4), "b": entry(8, 12)}, 12, "invalid offset for tensor `b`"),
        ({"a": entry(4, 8)}, 8, "invalid offset for tensor `a`"),
        ({"a": entry(0, 8)}, 12, "file not fully covered"),
        ({"a": entry(0, 8)}, 4, "cut off"),
        ({}, 4, "file not fully covered"),
        ({"a": entry(0, 8, [3])}, 8, "invalid shape"),
        ({"a": entry(0, 8, dtype="F33")}, 8, "unknown variant `F33`"),
        ({"a": entry(0, 8, [-2])}, 8, "integer `-2`"),
        ({"a": entry(0, 8, [2.0])}, 8, "floating point `2.0`"),
        ({"a": entry(0, 8, [True, 2])}, 8, "boolean `true`"),
        (
            {"a": {**entry(0, 8), "data_offsets": [8, 0]}},
            8,
            "invalid offset for tensor `a`",
        ),
        ({"a": {**entry(0, 8), "data_offsets": [0]}}, 8, "a tuple of size 2"),
        ({"a": {**entry(0, 8), "dtype": ["F32"]}}, 8, "expected string"),
        ({"a": {"dtype": "F32", "shape": [2]}}, 8, "missing field `data_offsets`"),
        ({"a": 3}, 8, "expected struct TensorInfo"),
        ({"__metadata__": {"n": 1}}, 0, "expected a string"),
        ([], 0, "invalid JSON"),
        (b'{"a": ', 0, "invalid JSON"),
        (b'{"\xff": 1}', 0, "invalid UTF-8"),
        (b'{"a":' + b"[" * 100_000, 0, "recursion limit exceeded"),
        (b'{"a": 1' + b"0" * 5000 + b"}", 0, "number out of range"),
    ],
)
def test_refuses_in_one_line(
    tmp_path: Path, header: object, data: int, reason: str
) -> None:
    path = write(tmp_path / "bad.safetensors", header, bytes(data))
    with pytest.raises(DoRAError) as caught:
        read_header(path)
    message = str(caught.value)
    assert reason in message
    assert str(path) in message
    assert "\n" not in message


def test_refuses_a_name_that_appears_twice(tmp_path: Path) -> None:
    # Both entries are valid, so safetensors keeps the second and reports nothing.
    tensor = json.dumps(entry(0, 4))
    path = write(tmp_path / "x", f'{{"a": {tensor}, "a": {tensor}}}'.encode(), bytes(4))
    with pytest.raises(DoRAError, match="'a' appears twice"):
        read_header(path)


def test_refuses_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "empty.safetensors"
    path.touch()
    with pytest.raises(DoRAError, match="it is empty"):
        read_header(path)


@pytest.mark.parametrize("size", [3, 8, 40])
def test_refuses_a_file_cut_in_its_header(tmp_path: Path, size: int) -> None:
    path = write(tmp_path / "x", {"a": entry(0, 4)}, bytes(4))
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(DoRAError, match="not a valid safetensors file"):
        read_header(path)


def test_refuses_a_huge_header_without_reading_it(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes((100_000_001).to_bytes(8, "little") + b"{")
    with pytest.raises(DoRAError, match="header too large"):
        read_header(path)
