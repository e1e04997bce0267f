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
    with pytest.raises(DoRAError, match="half a surrogate pair"):
        read_header(path)


@pytest.mark.parametrize("size", [2**63, 10**4000])
def test_a_size_beyond_any_file_is_refused(tmp_path: Path, size: int) -> None:
    path = write(tmp_path / "a.safetensors", {"a": entry(0, 4, [size])}, bytes(4))
    with pytest.raises(DoRAError, match="bad shape"):
        read_header(path)


def test_reads_what_mlx_writes(tmp_path: Path) -> None:
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
        ({"a": entry(0, 8), "b": entry(4, 12)}, 12, "'b' overlaps"),
        ({"a": entry(0, 4), "b": entry(8, 12)}, 12, "4 unused bytes lie before 'b'"),
        ({"a": entry(4, 8)}, 8, "4 unused bytes lie before 'a'"),
        ({"a": entry(0, 8)}, 12, "4 bytes follow the last tensor"),
        ({"a": entry(0, 8)}, 4, "cut off"),
        ({}, 4, "4 bytes follow"),
        ({"a": entry(0, 8, [3])}, 8, "need 12 bytes, but spans 8"),
        ({"a": entry(0, 8, dtype="F33")}, 8, "unknown dtype 'F33'"),
        ({"a": entry(0, 8, [-2])}, 8, "bad shape"),
        ({"a": entry(0, 8, [2.0])}, 8, "bad shape"),
        ({"a": entry(0, 8, [True, 2])}, 8, "bad shape"),
        ({"a": {**entry(0, 8), "data_offsets": [8, 0]}}, 8, "bad data_offsets"),
        ({"a": {**entry(0, 8), "data_offsets": [0]}}, 8, "bad data_offsets"),
        ({"a": {**entry(0, 8), "dtype": ["F32"]}}, 8, "unknown dtype"),
        ({"a": {"dtype": "F32", "shape": [2]}}, 8, "has dtype, shape"),
        ({"a": 3}, 8, "must be an object"),
        ({"__metadata__": {"n": 1}}, 0, "__metadata__"),
        ([], 0, "does not start with '{'"),
        (b'{"a": ', 0, "is not JSON"),
        (b'{"\xff": 1}', 0, "is not JSON"),
        (b'{"a":' + b"[" * 100_000, 0, "is not JSON"),
        (b'{"a": 1' + b"0" * 5000 + b"}", 0, "is not JSON"),
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
    one = json.dumps(entry(0, 4))
    two = json.dumps(entry(4, 8))
    path = write(tmp_path / "x", f'{{"a": {one}, "a": {two}}}'.encode(), bytes(8))
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
    with pytest.raises(DoRAError, match="claims 100000001 bytes"):
        read_header(path)
