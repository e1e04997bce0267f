"""The converter compared with GGUF's layout, which NumPy reads from the raw bytes."""

import struct
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_dora.demo.gguf import read_gguf
from mlx_dora.demo.model import NAME, demo_model
from mlx_dora.demo.wheel import VERSION
from mlx_dora.errors import DoRAError
from tests.checks import to_numpy

F32, Q4_1, Q8_0 = 0, 3, 8
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q"}


class Reader:
    """Reads the needed part of GGUF version 3: header, tensor table, three types."""

    def __init__(self, path: Path) -> None:
        self.data = path.read_bytes()
        self.at = 4
        assert self.data[:4] == b"GGUF"
        self.take("I")
        tensors, values = self.take("Q"), self.take("Q")
        self.metadata = {self.text(): self.value(self.take("I")) for _ in range(values)}
        self.table: dict[str, tuple[list[int], int, int]] = {}
        for _ in range(tensors):
            name, rank = self.text(), self.take("I")
            shape = [self.take("Q") for _ in range(rank)]
            self.table[name] = (shape[::-1], self.take("I"), self.take("Q"))
        alignment = self.metadata.get("general.alignment", 32)
        self.start = -(-self.at // alignment) * alignment

    def take(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += struct.calcsize("<" + code)
        return value

    def text(self) -> str:
        size = self.take("Q")
        self.at += size
        return self.data[self.at - size : self.at].decode()

    def value(self, kind: int) -> Any:
        if kind == 8:
            return self.text()
        if kind == 9:
            inner, count = self.take("I"), self.take("Q")
            return [self.value(inner) for _ in range(count)]
        return self.take(SCALARS[kind])

    def dense(self, name: str) -> np.ndarray:
        shape, kind, offset = self.table[name]
        count, at = int(np.prod(shape)), self.start + offset
        if kind == F32:
            return np.frombuffer(self.data, "<f4", count, at).reshape(shape)
        width = {Q4_1: 20, Q8_0: 34}[kind]
        raw = np.frombuffer(self.data, np.uint8, count // 32 * width, at)
        blocks = raw.reshape(-1, width)

        def half(first: int) -> np.ndarray:
            return blocks[:, first : first + 2].copy().view("<f2").astype(np.float64)

        if kind == Q8_0:
            return (half(0) * blocks[:, 2:].view(np.int8)).reshape(shape)
        nibbles = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
        return (half(0) * nibbles + half(2)).reshape(shape)

    def rotated(self, name: str, heads: int) -> np.ndarray:
        """Move row 2i + h of a head, llama.cpp's order, back to row i + h * half."""
        rows = self.dense(name)
        size = rows.shape[0] // heads
        order = [2 * i + h for h in (0, 1) for i in range(size // 2)]
        return np.concatenate(
            [rows[head * size : (head + 1) * size][order] for head in range(heads)]
        )


@pytest.mark.real_model
def test_tensors_are_the_files_own_blocks() -> None:
    folder = demo_model(source="wheel")
    loaded = mx.load(str(folder / "model.safetensors"))
    assert isinstance(loaded, dict)
    reader = Reader(folder.parent / f"{NAME}-{VERSION}.Q4_1.gguf")
    assert len(loaded) == len(reader.table) == 272
    plain = {"ffn_down": "mlp.down_proj", "attn_v": "self_attn.v_proj"}
    for block in (0, 17, 29):
        ours, theirs = f"model.layers.{block}.", f"blk.{block}."
        for theirs_name, name in plain.items():
            expected = reader.dense(f"{theirs}{theirs_name}.weight")
            actual = to_numpy(loaded[f"{ours}{name}.weight"])
            np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6)
        for letter, heads in (("q", 9), ("k", 3)):
            expected = reader.rotated(f"{theirs}attn_{letter}.weight", heads)
            actual = to_numpy(loaded[f"{ours}self_attn.{letter}_proj.weight"])
            np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6)
    embedding = to_numpy(loaded["model.embed_tokens.weight"])
    expected = reader.dense("token_embd.weight")
    np.testing.assert_allclose(embedding, expected, rtol=0, atol=1e-6)


def test_a_file_that_is_not_a_gguf_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.gguf"
    path.write_bytes(b"GGML" + bytes(64))
    with pytest.raises(DoRAError, match="not a GGUF file"):
        read_gguf(path, "float32")


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.gguf"
    metadata: Any = {"general.architecture": "gemma"}
    mx.save_gguf(str(path), {"token_embd.weight": mx.zeros((4, 4))}, metadata)
    with pytest.raises(DoRAError, match="'gemma'"):
        read_gguf(path, "float32")
